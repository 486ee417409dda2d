"""What is done to images anew in each task: classes turned as a whole, each image moved a little."""

import pytest
import torch

from fomaml.data.augment import jittered, turned
from fomaml.data.source import ClassSource
from fomaml.episodes import Episodes
from fomaml.errors import InputError
from fomaml.tasks import one

WAYS, SHOTS, QUERIES = 3, 2, 4
SIZES = {"ways": WAYS, "shots": SHOTS, "query_shots": QUERIES}


def source(side=3, classes=5):
    """Images without symmetry, each its own."""
    images = torch.rand(8 * classes, 1, side, side)
    return ClassSource(images, torch.arange(classes).repeat_interleave(8))


def quarters(plain, other):
    """(tasks, ways) by how many quarters each class of `other` is turned from `plain`, support and query alike."""
    parts = []
    for part, examples in (("support", SHOTS), ("query", QUERIES)):
        a, b = (
            getattr(tasks, part).inputs.unflatten(1, (WAYS, examples)) for tasks in (plain, other)
        )  # (tasks, ways, examples, 1, side, side)
        same = torch.stack([(a.rot90(k, (-2, -1)) == b).flatten(2).all(-1) for k in range(4)], -1)
        assert (same.sum(-1) == 1).all()
        parts.append(same.int().argmax(-1))
    assert torch.equal(*parts)  # the query examples are turned as the support examples of their class
    return parts[0]


def test_each_class_of_each_task_is_turned_as_it_is_told():
    inputs = torch.rand(2, 3, 4, 1, 5, 5)
    told = torch.tensor([[0, 1, 2], [3, 3, 0]])
    found = turned(inputs, told)
    for task in range(2):
        for way in range(3):
            expected = torch.stack(
                [image.rot90(int(told[task, way]), (-2, -1)) for image in inputs[task, way]]
            )
            assert torch.equal(found[task, way], expected)


def test_turns_leave_classes_and_examples_as_they_are():
    own = source()
    plain, other = (Episodes(own, **SIZES, seed=3, turns=turns).batch(0, 500) for turns in (False, True))
    drawn = quarters(plain, other)
    assert torch.equal(plain.support.targets, other.support.targets)
    counts = drawn.flatten().bincount(minlength=4)
    assert (counts - 375).abs().max() < 5 * 375**0.5  # each as often
    together = (4 * drawn[:, 0] + drawn[:, 1]).bincount(minlength=16)
    assert (together - 500 / 16).abs().max() < 5 * (500 / 16) ** 0.5  # each class by itself


def test_turns_are_a_function_of_the_seed_and_the_index():
    own = source()
    first = Episodes(own, **SIZES, seed=3, turns=True)
    again = Episodes(own, **SIZES, seed=3, turns=True)
    for index, task in enumerate(one(first.batch(4, 3), i) for i in range(3)):
        assert torch.equal(task.query.inputs, again[4 + index].query.inputs)
    other = Episodes(own, **SIZES, seed=4, turns=True)
    assert not torch.equal(first[4].query.inputs, other[4].query.inputs)


@pytest.mark.parametrize("shape", [(3,), (1, 3, 4), (3, 3)])
def test_only_square_images_turn(shape):
    own = ClassSource(torch.zeros(24, *shape), torch.arange(3).repeat_interleave(8))
    with pytest.raises(InputError) as error:
        Episodes(own, **SIZES, turns=True)
    text = "turns by 90 degrees need square images (channels, side, side), but the inputs have shape"
    assert str(error.value) == f"{text} {shape}"
    Episodes(own, **SIZES)[0]


# --- jitter -----------------------------------------------------------------------------------------


def test_jitter_moves_an_image_as_its_random_numbers_say():
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = 1
    still = torch.full((1, 6), 0.5)
    torch.testing.assert_close(jittered(image, still, 0.5), image)
    right = still.clone()
    right[0, 2] = 17 / 18  # 8/9 of the half, and 4/9 of half an image are two of nine pixels
    torch.testing.assert_close(jittered(image, right, 1.0), image.roll(-2, -1), rtol=0, atol=1e-5)
    wide = image.roll(2, -1)
    stretched = still.clone()
    stretched[0, 0] = 1.0  # twice the distance from the middle is seen
    torch.testing.assert_close(jittered(wide, stretched, 1.0), image.roll(1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("turns", [False, True])
def test_jitter_moves_each_image_by_itself_and_little(turns):
    own = source(side=12)
    options = {**SIZES, "seed": 3, "turns": turns}
    plain, moved = (Episodes(own, **options, jitter=jitter).batch(0, 20) for jitter in (0.0, 0.05))
    for part in ("support", "query"):
        before, after = getattr(plain, part), getattr(moved, part)
        assert torch.equal(before.targets, after.targets)
        changes = (before.inputs - after.inputs).flatten(2).abs().mean(-1)
        assert (changes > 0).all() and (changes < 0.2).all()  # two images here differ by 1/3
        assert len(changes.flatten().unique()) == changes.numel()


def test_jitter_is_a_function_of_the_seed_and_the_index():
    own = source()
    first = Episodes(own, **SIZES, seed=3, jitter=0.1)
    again = Episodes(own, **SIZES, seed=3, jitter=0.1)
    batch = first.batch(4, 3)
    for i in range(3):
        torch.testing.assert_close(one(batch, i).query.inputs, again[4 + i].query.inputs)
    assert not torch.equal(first[4].query.inputs, first[5].query.inputs)


def test_only_images_are_jittered():
    own = ClassSource(torch.zeros(24, 3), torch.arange(3).repeat_interleave(8))
    with pytest.raises(
        InputError, match=r"^jitter needs images \(channels, height, width\), but the inputs have"
    ):
        Episodes(own, **SIZES, jitter=0.1)


# --- copies -----------------------------------------------------------------------------------------


def test_copies_are_the_image_as_it_is_and_then_moved():
    own = source(side=12)
    plain = Episodes(own, **SIZES, seed=3).batch(0, 5)
    copied = Episodes(own, **SIZES, seed=3, jitter=0.05, copies=3).batch(0, 5)
    for part in ("support", "query"):
        before, after = getattr(plain, part), getattr(copied, part)
        images = after.inputs.unflatten(1, (-1, 3))
        assert torch.equal(images[:, :, 0], before.inputs)
        for copy in (1, 2):
            changes = (images[:, :, copy] - before.inputs).flatten(2).abs().mean(-1)
            assert (changes > 0).all() and (changes < 0.2).all()
        assert not torch.equal(images[:, :, 1], images[:, :, 2])
        assert torch.equal(after.targets.unflatten(1, (-1, 3)), before.targets.unsqueeze(2).expand(-1, -1, 3))
        assert after.targets.is_contiguous()


def test_copies_need_jitter():
    with pytest.raises(
        InputError, match=r"^3 copies of each image are the same without jitter, got jitter 0.0$"
    ):
        Episodes(source(), **SIZES, copies=3)
    with pytest.raises(InputError, match="copies must be"):
        Episodes(source(), **SIZES, copies=0, jitter=0.1)
