import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import fomaml.errors
from draws import COUNTS, augmented, digest, episodes, regression
from fomaml.data.source import ClassSource
from fomaml.data.synthetic import Sinusoids
from fomaml.episodes import Episodes, RegressionEpisodes
from fomaml.errors import InputError


def same(a, b):
    return all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))


@pytest.fixture(scope="module")
def many():
    """6 000 tasks: class and row drawn at each place, (tasks, ways, shots + query_shots)."""
    tasks = episodes().batch(0, 6000)
    parts = (tasks.support.inputs.view(6000, 3, 2, 2), tasks.query.inputs.view(6000, 3, 3, 2))
    return torch.cat(parts, dim=2).unbind(-1)


def assert_uniform(observed, expected):
    """Counts of events within 5 standard deviations of their expectation."""
    observed = torch.as_tensor(observed, dtype=torch.float64)
    assert expected > 100
    assert (observed - expected).abs().max() < 5 * math.sqrt(expected), (observed, expected)


def test_shapes_dtypes_and_order():
    tasks = episodes().batch(4, 6)
    assert tasks.support.inputs.shape == (6, 6, 2)
    assert tasks.query.inputs.shape == (6, 9, 2)
    assert tasks.support.targets.dtype == tasks.query.targets.dtype == torch.int64
    assert tasks.support.targets.tolist() == [[0, 0, 1, 1, 2, 2]] * 6
    assert tasks.query.targets.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 6
    images = ClassSource(torch.zeros(10, 3, 4, 5), torch.arange(10) // 5)
    task = Episodes(images, ways=2, shots=1, query_shots=4)[0]
    assert task.support.inputs.shape == (2, 3, 4, 5)
    assert task.query.inputs.shape == (8, 3, 4, 5)
    assert episodes().batch(0, 0).query.inputs.shape == (0, 9, 2)


@pytest.mark.parametrize("more", [{}, {"turns": True}, {"jitter": 0.1, "copies": 2}])
def test_the_classes_of_a_task_are_those_that_its_examples_are_of(more):
    names = [f"class {number}" for number in range(12)]
    # each image is of the number of its class alone, which neither turning nor moving changes at its centre
    images = torch.arange(12.0).repeat_interleave(6).view(-1, 1, 1, 1).expand(-1, 1, 5, 5).contiguous()
    tasks = Episodes(
        ClassSource(images, torch.arange(12).repeat_interleave(6), names),
        ways=4,
        shots=2,
        query_shots=3,
        seed=5,
        **more,
    )
    for index in (0, 7):
        told = tasks.classes_of(index)
        for part in tasks[index]:
            centres = part.inputs[:, 0, 2, 2].round().long().tolist()
            assert [names[centre] for centre in centres] == [told[label] for label in part.targets.tolist()]


def test_targets_agree_with_classes_and_examples_are_never_drawn_twice(many):
    classes, rows = many
    assert (classes == classes[:, :, :1]).all()  # one class per way
    for a, b in combinations(range(3), 2):  # three different ones
        assert (classes[:, a, 0] != classes[:, b, 0]).all()
    assert (rows.sort(dim=2).values.diff(dim=2) > 0).all()  # so support and query are disjoint
    assert (rows < torch.tensor(COUNTS)[classes]).all()


def test_classes_are_uniform_at_every_label(many):
    classes, _ = many
    for way in range(3):
        assert_uniform(classes[:, way, 0].bincount(minlength=4), 6000 / 4)
    triples = (classes[:, :, 0] * torch.tensor([16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(triples) == 24
    assert_uniform(triples, 6000 / 24)


@pytest.mark.parametrize(("label", "count"), list(enumerate(COUNTS)))
def test_rows_are_uniform_at_every_place_and_in_pairs(many, label, count):
    classes, rows = many
    rows = rows[classes[:, :, 0] == label]  # (times drawn, 5)
    for place in range(5):
        assert_uniform(rows[:, place].bincount(minlength=count), len(rows) / count)
    pairs = torch.zeros(count, count)
    for a, b in combinations(range(5), 2):
        pairs.index_put_((rows[:, a], rows[:, b]), torch.ones(len(rows)), accumulate=True)
    pairs = (pairs + pairs.T)[torch.ones(count, count, dtype=torch.bool).triu(1)]
    assert_uniform(pairs, len(rows) * math.comb(5, 2) / math.comb(count, 2))


@pytest.mark.parametrize("make", [episodes, augmented, regression])
def test_a_task_is_a_function_of_seed_and_index(make):
    tasks = make(seed=3)
    batch = tasks.batch(11, 5)
    for j in range(5):
        alone = tasks[11 + j]
        assert same(alone, tasks[11 + j])
        assert same(alone, batch.map(lambda tensor, j=j: tensor[j]))
        assert same(alone, make(seed=3)[11 + j])
        assert not same(alone, make(seed=4)[11 + j])
        assert not same(alone, tasks[12 + j])
    digests = {tasks[i].support.inputs.numpy().tobytes() for i in range(50)}
    assert len(digests) > 45


@pytest.mark.parametrize("make", [episodes, augmented, regression])
def test_global_random_state_is_neither_used_nor_touched(make):
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = make()[0]
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    np.random.seed(1)
    torch.manual_seed(1)
    assert same(first, make()[0])


def test_two_processes_draw_the_same_bytes():
    here, package = Path(__file__).parent, Path(fomaml.errors.__file__).parents[1]
    code = "import draws; print(draws.digest())"
    processes = []
    for hash_seed in ("1", "2"):
        paths = os.pathsep.join([str(here), str(package), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": hash_seed}
        processes.append(
            subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        )
    answers = [process.communicate()[0].strip() for process in processes]
    assert answers == [digest()] * 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ways": 5}, "5 ways need 5 classes, but there are 4"),
        ({"shots": 3}, "class '0' has 5 examples, but 3 shots + 3 query examples per class need 6"),
        ({"ways": 0}, "ways must be a whole number of 1 or more, got 0"),
        ({"shots": 1.5}, "shots must be a whole number of 1 or more, got 1.5"),
        ({"query_shots": -1}, "query_shots must be a whole number of 1 or more, got -1"),
    ],
)
def test_errors_of_episodes(sizes, message):
    with pytest.raises(InputError) as error:
        episodes(**sizes)
    assert str(error.value) == message


def test_the_smallest_class_is_named():
    named = ClassSource(torch.zeros(7, 1), torch.tensor([0, 0, 0, 1, 1, 2, 2]), ["a", "b", "c"])
    with pytest.raises(InputError, match="class 'b' has 2 examples, but 2 shots"):
        Episodes(named, ways=2, shots=2, query_shots=1)


@pytest.mark.parametrize("make", [episodes, augmented, regression])
@pytest.mark.parametrize("seed", [None, -1, 0.5, True, 2**128])
def test_a_seed_that_would_not_repeat_is_refused(make, seed):
    with pytest.raises(InputError) as error:
        make(seed=seed)[0]
    assert str(error.value) == f"seed must be a whole number from 0 to 2**128 - 1, got {seed!r}"


@pytest.mark.parametrize("name", ["shots", "query_shots"])
def test_errors_of_regression_episodes(name):
    with pytest.raises(InputError) as error:
        regression(**{name: 0})
    assert str(error.value) == f"{name} must be a whole number of 1 or more, got 0"


@pytest.fixture
def float64():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def test_regression_shapes_and_default_dtype():
    task, tasks = regression()[2], regression().batch(2, 3)
    assert [tuple(t.shape) for part in task for t in part] == [(5, 1), (5, 1), (7, 1), (7, 1)]
    assert [tuple(t.shape) for part in tasks for t in part] == [(3, 5, 1)] * 2 + [(3, 7, 1)] * 2
    assert {t.dtype for part in task for t in part} == {torch.float32}


def test_sinusoids_are_recovered_from_the_support_set(float64):
    tasks = regression().batch(0, 2000)
    x, y = tasks.support
    assert x.dtype == y.dtype == torch.float64
    # A sin(x - p) = A cos p sin x - A sin p cos x: linear in the two unknowns
    weights = torch.linalg.lstsq(torch.cat([x.sin(), x.cos()], dim=-1), y).solution  # (2000, 2, 1)
    predicted = torch.cat([tasks.query.inputs.sin(), tasks.query.inputs.cos()], dim=-1) @ weights
    torch.testing.assert_close(predicted, tasks.query.targets, atol=1e-9, rtol=0)
    amplitude, phase = weights.norm(dim=(1, 2)), torch.atan2(-weights[:, 1, 0], weights[:, 0, 0])
    places = {"A": (amplitude, 0.1, 5.0), "p": (phase, 0.0, math.pi), "x": (x.flatten(), -5.0, 5.0)}
    for name, (values, low, high) in places.items():
        share = (values - low) / (high - low)
        assert -1e-9 < share.min() < 0.01 and 0.99 < share.max() < 1 + 1e-9, name
        assert_uniform(torch.histc(share, 10, 0, 1), len(share) / 10)


def test_the_family_sets_function_and_interval():
    family = Sinusoids(amplitude=(2.0, 2.0), phase=(0.0, 0.0), inputs=(1.0, 1.5))
    x, y = RegressionEpisodes(family, shots=50, query_shots=1)[0].support
    torch.testing.assert_close(y, 2 * x.sin())
    assert 1 <= x.min() < 1.1 and 1.4 < x.max() <= 1.5
