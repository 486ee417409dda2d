import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from fomaml.data.augment import rotated, warped
from fomaml.data.source import ClassSource, pixels
from fomaml.errors import InputError

TO_MODEL = transforms.Compose([transforms.ToTensor(), lambda x: transforms.Normalize(
    [0.5] * len(x), [0.5] * len(x))(x)])  # fmt: skip


def rows(targets, names=None, decode=None):
    """A source whose inputs are the row numbers in the order given: (examples, 1) int64."""
    return ClassSource(torch.arange(len(targets)).view(-1, 1), torch.tensor(targets), names, decode)


def test_sorts_by_class_and_keeps_the_order_within():
    source = rows([7, -1, 7, 3, -1, 7])
    assert source.names == ["-1", "3", "7"]
    assert len(source) == 3
    assert source.counts.tolist() == [2, 1, 3]
    assert source.offsets.tolist() == [0, 2, 3]
    assert source.inputs.flatten().tolist() == [1, 4, 3, 0, 2, 5]
    assert source.labels().tolist() == [0, 0, 1, 2, 2, 2]


def test_take_keeps_the_shape_of_the_indices_and_decodes():
    source = rows([1, 0, 1, 0], decode=lambda drawn: drawn * 10 + torch.arange(2))  # (n, 1) → (n, 2)
    taken = source.take(torch.tensor([[0, 1, 2], [3, 0, 0]]))
    assert taken.shape == (2, 3, 2)
    assert taken[..., 0].tolist() == [[10, 30, 0], [20, 10, 10]]
    assert (taken[..., 1] - taken[..., 0]).unique().tolist() == [1]
    assert rows([0, 1]).take(torch.tensor(1)).tolist() == [1]


def test_take_returns_a_copy():
    source = rows([0, 1])
    source.take(torch.tensor([0, 1])).zero_()
    assert source.inputs.flatten().tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_equal_torchvisions_to_tensor_and_normalize(dtype):
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        decoded = pixels()(images)
        other = pixels(0.1307, 0.3081)(images)
    finally:
        torch.set_default_dtype(default)
    expected = torch.stack([TO_MODEL(Image.fromarray(image[0].numpy())) for image in images])
    assert decoded.dtype == other.dtype == dtype
    torch.testing.assert_close(decoded, expected.to(dtype), atol=1e-6, rtol=0)
    other_expected = transforms.Normalize((0.1307,), (0.3081,))((expected + 1) / 2)
    torch.testing.assert_close(other, other_expected.to(dtype), atol=1e-6, rtol=0)
    assert images.flatten().tolist() == list(range(256))


def test_arrays_are_taken_as_tensors():
    inputs, targets = np.arange(6.0).reshape(3, 2), np.array([1, 0, 1], np.uint16)
    source = ClassSource(inputs, targets)
    assert source.inputs.tolist() == [[2, 3], [0, 1], [4, 5]] and source.inputs.dtype == torch.float64


def test_select_by_name_and_number_in_the_order_given():
    source = rows([0, 1, 2, 0, 1, 2], ["a", "b", "c"], decode=lambda x: x + 100)
    chosen = source.select(["c", 0])
    assert chosen.names == ["c", "a"]
    assert chosen.inputs.flatten().tolist() == [2, 5, 0, 3]
    assert chosen.counts.tolist() == [2, 2]
    assert chosen.take(torch.tensor([0])).item() == 102
    assert source.select(c for c in "b").inputs.flatten().tolist() == [1, 4]


def test_joined_appends_transformed_classes():
    source = rows([0, 1, 1], ["7", "9"], decode=lambda x: x * 2)
    joined = source.joined([("plus", lambda x: x + 10), ("minus", lambda x: x - 10)])
    assert joined.names == ["7", "9", "7 plus", "9 plus", "7 minus", "9 minus"]
    assert joined.counts.tolist() == [1, 2, 1, 2, 1, 2]
    assert joined.inputs.flatten().tolist() == [0, 1, 2, 10, 11, 12, -10, -9, -8]
    assert joined.take(torch.tensor([3])).item() == 20
    assert source.joined([]).names == ["7", "9"]


def test_rotated_turns_whole_classes_counter_clockwise():
    images = torch.tensor([[[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]]], dtype=torch.uint8)
    turned = rotated(ClassSource(images, torch.tensor([1, 0]), ["p", "q"]))
    names = ["p", "q", "p rot90", "q rot90", "p rot180", "q rot180", "p rot270", "q rot270"]
    assert turned.names == names
    assert turned.inputs.dtype == torch.uint8
    by_name = dict(zip(names, turned.inputs.flatten(1).tolist()))
    assert by_name["q"] == [1, 2, 3, 4]
    assert by_name["q rot90"] == [2, 4, 1, 3]
    assert by_name["q rot180"] == [4, 3, 2, 1]
    assert by_name["q rot270"] == [3, 1, 4, 2]
    assert by_name["p rot180"] == [8, 7, 6, 5]


def test_warped_fills_up_with_pseudo_characters_of_one_warp_each():
    stroke = torch.zeros(1, 28, 28, dtype=torch.uint8)
    stroke[:, 4:24, 12:16] = 255
    source = ClassSource(stroke.expand(6, 1, 28, 28), torch.tensor([0, 0, 0, 1, 1, 1]), ["p", "q"])
    many = warped(source, 12, examples=5)
    assert len(many) == 12
    assert many.names[:8] == rotated(source).names
    assert many.counts.tolist() == [3] * 8 + [5] * 4
    classes = many.inputs.split(many.counts.tolist())[8:]
    for images in classes:  # equal drawings stay equal: the warp is the class's, not the example's
        assert images.dtype == torch.uint8
        assert torch.equal(images, images[:1].expand_as(images))
        assert images.float().mean() > 1
    for one, other in itertools.combinations(classes, 2):
        assert not torch.equal(one, other)
    assert torch.equal(many.inputs, warped(source, 12, examples=5).inputs)
    assert not torch.equal(many.inputs, warped(source, 12, examples=5, seed=1).inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_warped_images_of_any_dtype_are_those_of_bytes_but_for_the_rounding(dtype):
    images = torch.randint(0, 256, (8, 1, 9, 9), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(8) % 2
    of_bytes, found = (
        warped(ClassSource(own, labels), 12, examples=5) for own in (images, images.to(dtype) / 255)
    )
    assert found.inputs.dtype == dtype
    assert (found.inputs * 255 - of_bytes.inputs).abs().max() <= 0.5001


def test_to_moves_the_inputs_and_nothing_else():
    source = rows([0, 1, 1], ["a", "b"], decode=len)
    moved = source.to("meta")
    assert moved.inputs.device.type == "meta"
    assert moved.counts.tolist() == [1, 2]
    assert (moved.names, moved.decode) == (["a", "b"], len)
    assert source.inputs.device.type == "cpu"


@pytest.mark.parametrize(
    ("inputs", "targets", "names", "message"),
    [
        (torch.zeros(2, 1), torch.zeros(2), None,
         "targets must be a vector of integer labels, got torch.float32 of shape (2,)"),
        (torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64), None,
         "targets must be a vector of integer labels, got torch.int64 of shape (2, 1)"),
        (torch.zeros(2, 1), ["a", "b"], None,
         "inputs and targets must be tensors or arrays of numbers (ValueError: too many dimensions 'str'); "
         "a dataset goes to ClassSource.from_dataset"),
        (torch.tensor([0, math.nan, math.inf]), torch.tensor([7, 9, 7]), None,
         "example 1 of the data, of class '9', holds nan or infinite numbers; mend it or leave it out"),
        (np.where(np.arange(4096).reshape(2048, 2) == 4001, -np.inf, 0), np.arange(2048) // 1024, ["a", "b"],
         "example 2000 of the data, of class 'b', holds nan or infinite numbers; mend it or leave it out"),
        (torch.zeros(3, 1), torch.tensor([0, 1]), None, "3 inputs but 2 targets"),
        (torch.zeros(0, 1), torch.tensor([], dtype=torch.int64), None,
         "a class source needs at least one example, got none"),
        (torch.zeros(2, 1), torch.tensor([0, 5]), ["a"], "1 class names for 2 classes"),
    ],
)  # fmt: skip
def test_errors_of_a_source(inputs, targets, names, message):
    with pytest.raises(InputError) as error:
        ClassSource(inputs, targets, names)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "z"], "no class 'z' here; there are: a, b"),
        ([2], "no class number 2 here; there are 2"),
        ([-1], "no class number -1 here; there are 2"),
        ([1.5], "a class must be a whole number or a name, got 1.5"),
        ([], "no classes selected; there are: a, b"),
    ],
)
def test_errors_of_select(classes, message):
    with pytest.raises(InputError) as error:
        rows([0, 1], ["a", "b"]).select(classes)
    assert str(error.value) == message
