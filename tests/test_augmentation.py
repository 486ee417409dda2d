"""Random changes of a set's inputs and of whole tasks: functions of seed and index, in episodes of either kind."""

import numpy as np
import pytest
import torch

from draws import episodes as of_classes
from draws import moved, moved_together
from fomaml import Episodes, GroupEpisodes, GroupSource, Task
from fomaml.data.source import ClassSource
from fomaml.errors import InputError

SEED = 5
GROUPS = np.repeat(np.arange(6), [7, 9, 12, 8, 11, 10])
NUMBERS = np.arange(2 * len(GROUPS)).reshape(-1, 2)


def of_groups(seed=0, query_shots=3, **options):
    source = GroupSource(NUMBERS, NUMBERS[:, 0] / 3, GROUPS)
    return GroupEpisodes(source, shots=2, query_shots=query_shots, seed=seed, **options)


def of_unequal(seed=0, **options):
    """Tasks of several sizes, which no batch stacks."""
    return of_groups(seed, query_shots=None, **options)


KINDS = {"classes": of_classes, "groups": of_groups, "unequal groups": of_unequal}


def random_of(index, stream):
    """What is documented: numpy's Philox with the seed as key and the index as its counter."""
    return np.random.Generator(np.random.Philox(key=SEED, counter=[0, 0, stream, index]))


def expected(plain, index, augment, augment_task):
    """The task with both changes, by hand."""
    sets = [part.inputs.clone() for part in plain]
    if augment:
        random = random_of(index, 1)
        for inputs in sets:
            inputs += torch.from_numpy(random.integers(1000, size=tuple(inputs.shape)))
    if augment_task:
        shift = int(random_of(index, 2).integers(1_000_000))
        for inputs in sets:
            inputs += shift
    return Task(*(part._replace(inputs=inputs) for part, inputs in zip(plain, sets)))


def assert_same(found, task):
    for mine, theirs in zip(found, task):
        assert torch.equal(mine.inputs, theirs.inputs) and torch.equal(mine.targets, theirs.targets)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("augment", "augment_task"), [(True, False), (False, True), (True, True)])
def test_a_function_of_seed_and_index(make, augment, augment_task):
    plain = make(SEED)
    changed = make(
        SEED, augment=moved if augment else None, augment_task=moved_together if augment_task else None
    )
    for index in range(9):
        task = changed[index]
        assert_same(task, expected(plain[index], index, augment, augment_task))
        assert not torch.equal(task.query.inputs, plain[index].query.inputs)
    for start, number in ((0, 9), (0, 2), (2, 1), (3, 5)):
        batch = changed.batch(start, number)
        tasks = batch if isinstance(batch, list) else [batch.map(lambda t, n=n: t[n]) for n in range(number)]
        assert len(tasks) == number
        for offset, task in enumerate(tasks):
            assert_same(task, changed[start + offset])


def test_no_tasks_are_no_tasks():
    found = of_classes(augment=moved, augment_task=moved_together).batch(3, 0)
    assert found.support.inputs.shape == (0, 6, 2) and found.query.targets.shape == (0, 9)


def test_what_is_changed_in_place_stays_out_of_the_source():
    def wiped(inputs, random):
        return inputs.zero_()

    def wiped_task(task, random):
        return task.map(torch.Tensor.zero_)

    for options in ({"augment": wiped}, {"augment_task": wiped_task}):
        source = ClassSource(torch.ones(8, 2), torch.arange(8) // 4)
        task = Episodes(source, ways=2, shots=1, query_shots=1, **options)[0]
        assert not task.query.inputs.any() and source.inputs.all()
        rows = GroupSource(torch.ones(8, 2), torch.arange(8.0), np.arange(8) // 4)
        assert not GroupEpisodes(rows, shots=1, query_shots=2, **options)[0].query.inputs.any()
        assert rows.take(np.arange(8))[0].all()


def test_augment_comes_after_decoding_and_copies():
    seen = []

    def note(inputs, random):
        seen.append((tuple(inputs.shape), inputs.dtype, float(inputs.max())))
        return inputs

    nines = torch.full((6, 1, 4, 4), 9, dtype=torch.uint8)
    images = ClassSource(nines, torch.arange(6) // 3, decode=lambda drawn: drawn.float() / 9)
    Episodes(images, ways=2, shots=1, query_shots=2, jitter=0.01, copies=3, augment=note)[0]
    assert [shape for shape, *_ in seen] == [(6, 1, 4, 4), (12, 1, 4, 4)]
    assert {kind for _, kind, _ in seen} == {torch.float32} and max(most for *_, most in seen) <= 1


def test_nested_inputs_and_targets_may_be_changed():
    def renamed(task, random):
        """Two labels change places, in both sets alike."""
        own = torch.from_numpy(random.permutation(3))
        return Task(*(part._replace(targets=own[part.targets]) for part in task))

    inputs = {"numbers": np.random.default_rng(0).normal(size=(60, 2)), "mask": np.ones((60, 2), bool)}
    labels = np.arange(60) % 3
    source = GroupSource(inputs, labels, np.arange(60) // 12)
    options = {"shots": 1, "query_shots": 2, "seed": SEED}
    louder = {
        "augment": lambda inputs, random: inputs | {"numbers": inputs["numbers"] * random.uniform(1, 2)}
    }
    plain, found = GroupEpisodes(source, **options)[4], GroupEpisodes(source, **options, **louder)[4]
    gain = random_of(4, 1).uniform(1, 2)
    assert torch.equal(found.support.inputs["numbers"], plain.support.inputs["numbers"] * gain)
    assert torch.equal(found.query.inputs["mask"], plain.query.inputs["mask"])
    renumbered = GroupEpisodes(source, **options, augment_task=renamed)[4]
    own = torch.from_numpy(random_of(4, 2).permutation(3))
    assert torch.equal(renumbered.query.targets, own[plain.query.targets])


def test_a_dict_that_is_changed_in_place_is_looked_at_too():
    def cut(inputs, random):
        inputs["x"] = inputs["x"][:, :1]
        return inputs

    source = GroupSource({"x": NUMBERS}, NUMBERS[:, 0] / 3, GROUPS)
    with pytest.raises(
        InputError, match=r"for the support inputs\['x'\] of task 0, expected torch.int64 \(2, 2\)"
    ):
        GroupEpisodes(source, shots=2, query_shots=1, augment=cut)[0]


@pytest.mark.parametrize("make", [of_classes, of_groups])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": lambda inputs, random: inputs[1:]},
         r"augment gave torch.int64 \(\d, 2\) on cpu for the support inputs of task 3, "
         r"expected torch.int64 \(\d, 2\) on cpu: it may change numbers alone"),
        ({"augment": lambda inputs, random: inputs.repeat(1, 2)}, r"augment gave torch.int64 \(\d, 4\)"),
        ({"augment": lambda inputs, random: inputs.double()}, r"augment gave torch.float64 .*, expected torch.int64"),
        ({"augment": lambda inputs, random: inputs.numpy()}, "augment gave ndarray for the support inputs"),
        ({"augment": lambda inputs, random: None}, "augment gave NoneType for the support inputs"),
        ({"augment": lambda inputs, random: (inputs, inputs)}, "augment gave tuple of 2 for the support inputs"),
        ({"augment_task": lambda task, random: task.support}, "augment_task gave Examples of 2 for task 3"),
        ({"augment_task": lambda task, random: tuple(task)}, "gave tuple of 2 for task 3, expected Task of 2"),
        ({"augment_task": lambda task, random: Task(task.query, task.support)},
         r"augment_task gave torch.int64 \(\d, 2\) on cpu for support.inputs of task 3, expected"),
        ({"augment_task": lambda task, random: task._replace(query=(task.query.inputs, task.query.targets))},
         "augment_task gave tuple of 2 for query of task 3, expected Examples of 2"),
        ({"augment": 3}, "augment must be a function of two arguments, got 3"),
        ({"augment_task": "turn"}, "augment_task must be a function of two arguments, got 'turn'"),
    ],
)  # fmt: skip
def test_what_gives_something_else_is_refused(make, options, message):
    with pytest.raises(InputError, match=message) as caught:
        make(**options).batch(3, 2)
    assert "\n" not in str(caught.value)
