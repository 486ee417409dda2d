"""The tasks of runs/watch.py, out of recordings whose samples say who does what, and when."""

import json

import numpy as np
import pytest
import torch

from pages import ROOT
from runs.watch_tasks import (
    EXERCISES,
    GAP,
    SCALE,
    WINDOW,
    Recordings,
    TrainingTasks,
    UnseenTasks,
    Variation,
    confusions,
    rotations,
)

SUBJECTS = 4
VARIED = Variation(mixed=True, turn=15, turn_each=10, gain=0.2, stretch=0.2, exchange=0.5)


def written(path, samples_of):
    """Recordings of four subjects in random order. samples_of: (moments, facts, places) → (samples, 6)."""
    random = np.random.default_rng(0)
    axes = np.meshgrid(range(1, SUBJECTS + 1), range(2), range(EXERCISES))
    facts = random.permutation(np.stack([axis.ravel() for axis in axes], axis=1))
    lengths = random.integers(940, 1500, len(facts))
    moments = np.concatenate([np.arange(length) for length in lengths])
    samples = samples_of(moments, facts.repeat(lengths, axis=0), np.arange(len(moments))).astype(np.float32)
    subject, arm, exercise = facts.T
    np.savez(path, samples=samples, lengths=lengths, subject=subject, right_arm=arm, exercise=exercise)
    return Recordings(path)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """The channels of a sample: its moment, subject, arm, exercise, 1 and its place in the file."""
    return written(
        tmp_path_factory.mktemp("watch") / "watch.npz",
        lambda moments, facts, places: np.column_stack([moments, facts, np.ones_like(moments), places]),
    )


def channels(windows):
    """(channels, ..., samples) as they are in the file."""
    return (windows * SCALE[:, None]).round().long().movedim(-2, 0)


@pytest.mark.parametrize("shots", [1, 5])
def test_a_new_person_is_asked_for_later_windows(recordings, shots):
    tasks = UnseenTasks(recordings, (2, 0), shots)
    assert tasks.owners == [2, 2, 0, 0]
    support, query = tasks.batch(0, 4)
    for index, (subject, arm) in enumerate([(3, 0), (3, 1), (1, 0), (1, 1)]):
        for (windows, targets), number in ((support, shots), (query, 16)):
            moment, who, side, exercise, _, _ = channels(windows[index])
            assert windows[index].shape == (number * EXERCISES, 6, WINDOW)
            assert (who == subject).all() and (side == arm).all()
            assert (exercise == targets[index][:, None]).all()
            assert (moment.diff(dim=-1) == 1).all()
        ends, begins = channels(support.inputs[index])[0], channels(query.inputs[index])[0]
        assert ends.unique().tolist() == list(range(WINDOW * shots))
        assert begins.min() == WINDOW * shots + GAP


@pytest.mark.parametrize("mixed", [False, True])
def test_training_tasks_share_no_sample(recordings, mixed):
    tasks = TrainingTasks(recordings, (1, 3), 3, 8, Variation(mixed=mixed), seed=5)
    support, query = tasks.batch(0, 20)
    for index in range(20):
        own, asked = channels(support.inputs[index]), channels(query.inputs[index])
        assert (own[3] == support.targets[index][:, None]).all()
        assert (asked[3] == query.targets[index][:, None]).all()
        for exercise in range(EXERCISES):
            known, later = own[5][own[3] == exercise], asked[5][asked[3] == exercise]
            assert len(known.unique()) == 3 * WINDOW  # in a row, none twice
            assert later.min() - known.max() > GAP
            assert later.max() - known.min() < 1500  # of the same recording
        assert len(own[2].unique()) == 1 and set(own[1].unique().tolist()) <= {2, 4}
    assert channels(support.inputs)[1].unique().tolist() == [2, 4]
    alone = all(len(channels(each)[1].unique()) == 1 for each in support.inputs)
    assert alone != mixed


def test_tasks_are_functions_of_their_index(recordings):
    shares = np.full((EXERCISES, EXERCISES), 1 / EXERCISES**2)
    tasks = TrainingTasks(recordings, (0, 1, 2), 2, 4, VARIED, 1, shares)
    many, one = tasks.batch(3, 5), tasks.batch(6, 1)
    for part, own in zip(many, one):
        assert torch.equal(part.inputs[3], own.inputs[0]) and torch.equal(part.targets[3], own.targets[0])


def test_names_are_exchanged_between_those_that_are_confused(recordings):
    shares = np.zeros((EXERCISES, EXERCISES))
    shares[1, 2], shares[4, 3] = 0.75, 0.25
    support, query = TrainingTasks(recordings, (0, 1), 1, 1, VARIED, 0, shares).batch(0, 400)
    assert torch.equal(support.targets, query.targets)
    names = [tuple(row) for row in support.targets.tolist()]
    counts = [
        names.count(row) for row in ((0, 1, 2, 3, 4, 5, 6), (0, 2, 1, 3, 4, 5, 6), (0, 1, 2, 4, 3, 5, 6))
    ]
    assert sum(counts) == 400
    for found, expected in zip(counts, (200, 150, 50)):
        assert abs(found - expected) < 40


def test_rotations_are_rotations():
    numbers = np.random.default_rng(0).standard_normal((50, 4))
    turns = rotations(numbers, 40)
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand(50, 3, 3))
    assert (torch.linalg.det(turns) > 0).all()
    angles = ((turns.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).arccos()
    expected = torch.from_numpy(np.deg2rad(40) * np.abs(numbers[:, 3])).float()
    torch.testing.assert_close(angles, expected, atol=2e-3, rtol=1e-3)


def test_what_is_alike_is_confused(tmp_path):
    random = np.random.default_rng(1)
    levels = np.array([1, 3, 9, 9, 27, 81, 243])  # exercises 2 and 3 are alike
    people = written(
        tmp_path / "watch.npz",
        lambda moments, facts, _: levels[facts[:, 2:]] * (1 + random.standard_normal((len(moments), 6))),
    )
    shares = confusions(people, (0, 1, 2))
    assert shares[2, 3] + shares[3, 2] == pytest.approx(1) and min(shares[2, 3], shares[3, 2]) > 0.3


def test_the_page_holds_the_kept_figures():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    kept = json.loads((ROOT / "runs" / "watch" / "watch.json").read_text(encoding="utf-8"))["shots"]
    assert list(kept) == ["1", "5"]
    for name, trials in ((name, row["trials"]) for name, row in kept["1"].items()):
        cells = [name]
        for row in (kept["1"][name], kept["5"][name]):
            cells.append(f"{100 * row['accuracy']:.1f} ± {100 * row['interval']:.1f}")
            gap = f"{100 * row['learner_minus_this']:+.1f} ± {100 * row['its_interval']:.1f}"
            cells.append("" if name == "meta-learned" else gap)
        assert f"| {' | '.join([*cells, str(trials)])} |".replace("|  |", "| |") in page


def test_the_kept_intervals_are_those_of_ten_people():
    kept = json.loads((ROOT / "runs" / "watch" / "watch.json").read_text(encoding="utf-8"))["shots"]
    for found in kept.values():
        ours = np.array(list(found["meta-learned"]["by_subject"].values()))
        assert len(ours) == 10
        for name, row in found.items():
            gaps = ours - np.array(list(row["by_subject"].values()))
            assert row["learner_minus_this"] == pytest.approx(gaps.mean(), abs=1e-9)
            if (
                name != "meta-learned"
            ):  # 2.262157 is the 97.5 % point of Student's t with 9 degrees of freedom
                assert row["its_interval"] == pytest.approx(2.262157 * gaps.std(ddof=1) / 10**0.5, rel=1e-5)
