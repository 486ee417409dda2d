"""What a dataset may hold, and how it may be given: read as its owner expects, else one line that says what to do."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import FakeData

from fomaml.data.source import ClassSource, pixels
from fomaml.errors import InputError
from fomaml.models import MLP
from fomaml.train import fomaml_train

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (6, 4), dtype=np.uint8)
COLOURS = RANDOM.integers(0, 256, (6, 4, 3), dtype=np.uint8)
WIDE = np.concatenate([COLOURS, COLOURS], axis=1)
TO_TENSOR = transforms.ToTensor()


class Named(list):
    """A dataset with the `classes` attribute that torchvision's have."""

    classes = ("ant", "bee", "cat")


class Stream(IterableDataset):
    """What has no items by number and no length."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __iter__(self):
        return iter(self.pairs)


class Endless:
    """Items by number, and no length."""

    def __getitem__(self, index):
        return torch.zeros(2), 0


def palette(transparent=None):
    """An image of 4 colours, by number, and the same in colours."""
    image = Image.fromarray(COLOURS).quantize(4)
    if transparent is None:
        return image, image.convert("RGB")
    image.info["transparency"] = transparent
    colours = np.array(image.convert("RGB"))
    colours[np.array(image) == transparent] = 255
    return image, Image.fromarray(colours)


def of_mode(mode):
    return Image.fromarray(COLOURS).convert(mode)


SIXTEEN = np.arange(24, dtype=np.uint16).reshape(6, 4) * 2849  # up to 65527
BY_HAND = torch.from_numpy(SIXTEEN.astype(np.float32))[None] / 65535
READ_ONLY = GREY.copy()
READ_ONLY.setflags(write=False)
# An input, and what a model is given of it.
IMAGES = {
    **{
        mode: (of_mode(mode), TO_TENSOR(of_mode(mode)))
        for mode in ("1", "L", "LA", "RGB", "RGBA", "CMYK", "HSV")
    },
    "P": (palette()[0], TO_TENSOR(palette()[1])),
    "P, transparent": (palette(2)[0], TO_TENSOR(palette(2)[1])),
    "PA": (palette()[0].convert("PA"), TO_TENSOR(palette()[1])),
    "I;16": (Image.fromarray(SIXTEEN), BY_HAND),
    "I;16B": (Image.frombytes("I;16B", (4, 6), SIXTEEN.astype(">u2").tobytes()), BY_HAND),
    "F": (Image.fromarray(BY_HAND[0].numpy()), BY_HAND),
    "bytes": (GREY, TO_TENSOR(GREY)),
    "bytes that may not be written": (READ_ONLY, TO_TENSOR(GREY)),
    "bytes backwards": (GREY[:, ::-1], TO_TENSOR(GREY[:, ::-1].copy())),
    "bytes with a channel": (GREY[..., None], TO_TENSOR(GREY)),
    "bytes in colour": (COLOURS, TO_TENSOR(COLOURS)),
    "bytes, channels first": (WIDE.transpose(2, 0, 1), TO_TENSOR(WIDE)),
    "two bytes": (SIXTEEN, BY_HAND),
    "two bytes of a Macintosh": (SIXTEEN.astype(">u2"), BY_HAND),
    "black and white": (GREY > 99, TO_TENSOR(255 * np.uint8(GREY > 99))),
    "floats": (COLOURS / 255, torch.from_numpy(COLOURS / 255)),  # as they are
    "a vector of bytes": (GREY[0], torch.from_numpy(GREY[0])),
    "a tensor of bytes": (torch.from_numpy(GREY), torch.from_numpy(GREY)),
    "a list": ([1.5, 2.5], torch.tensor([1.5, 2.5])),
    "a number": (np.float64(1.5), torch.tensor(1.5, dtype=torch.float64)),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_an_input_is_drawn_as_its_owner_expects(kind):
    given, expected = IMAGES[kind]
    drawn = ClassSource.from_dataset([(given, 3), (given, 5)]).take(torch.arange(2))
    assert drawn.dtype == expected.dtype
    torch.testing.assert_close(drawn, torch.stack([expected, expected]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [kind for kind in IMAGES if kind[0] in "1LPRCHIb"])
def test_images_are_whole_numbers_in_memory_and_for_a_decoder_of_ones_own(kind):
    given, expected = IMAGES[kind]
    source = ClassSource.from_dataset([(given, 3)], decode=lambda images: images.float() + 1)
    most = 65535 if "16" in kind else 255
    assert source.inputs.dtype == (torch.int32 if most == 65535 else torch.uint8)
    torch.testing.assert_close(source.take(torch.tensor([0]))[0], (expected * most).round() + 1)


FLAT = torch.randn(6, 3)
PAIRS = [(FLAT[i], (4 - i) % 3) for i in range(6)]
TARGETS = [label for _, label in PAIRS]
# The same six examples of classes 0, 1 and 2.
GIVEN = {
    "a list": lambda: PAIRS,
    "tuples of lists": lambda: tuple([list(pair) for pair in PAIRS]),
    "a dataset": lambda: TensorDataset(FLAT, torch.tensor(TARGETS)),
    "a subset": lambda: Subset(TensorDataset(FLAT, torch.tensor(TARGETS)), range(6)),
    "an iterable dataset": lambda: Stream(PAIRS),
    "a generator": lambda: (pair for pair in PAIRS),
    "zip": lambda: zip(FLAT, TARGETS),
    "a loader": lambda: DataLoader(PAIRS, batch_size=4),
    "a loader of a stream": lambda: DataLoader(Stream(PAIRS), batch_size=4),
    "a loader that does not batch": lambda: DataLoader(PAIRS, batch_size=None),
    "a loader with a sampler": lambda: DataLoader([*PAIRS, *PAIRS], batch_size=4, sampler=range(6)),
    "a loader of bare lists": lambda: DataLoader(
        PAIRS, batch_size=3, collate_fn=lambda batch: [*zip(*batch)]
    ),
    "arrays": lambda: [(row.numpy(), np.int64(label)) for row, label in PAIRS],
    "labels without dimensions": lambda: [(row, torch.tensor(label)) for row, label in PAIRS],
    "labels of one number": lambda: [(row, np.array([label], np.uint8)) for row, label in PAIRS],
    "float labels": lambda: [(row, np.float32(label)) for row, label in PAIRS],
    "parameters": lambda: [(nn.Parameter(row), label) for row, label in PAIRS],
    "words": lambda: [(row, "012"[label]) for row, label in PAIRS],
}


@pytest.mark.parametrize("kind", GIVEN)
def test_a_dataset_is_read_however_it_is_given(kind):
    source = ClassSource.from_dataset(GIVEN[kind]())
    assert source.names == ["0", "1", "2"]
    assert torch.equal(source.inputs, FLAT[torch.tensor(TARGETS).argsort(stable=True)])
    assert not source.inputs.requires_grad


def test_a_loader_shuffles_and_leaves_out_as_it_says():
    torch.manual_seed(0)
    source = ClassSource.from_dataset(DataLoader(PAIRS, batch_size=4, shuffle=True, drop_last=True))
    assert len(source.inputs) == 4


def test_torchvisions_datasets_are_read():
    data = FakeData(size=24, image_size=(3, 5, 7), num_classes=3)
    source = ClassSource.from_dataset(data)
    rows = sorted((label, i) for i, (_, label) in enumerate(data))
    assert source.inputs.dtype == torch.uint8 and source.names == ["0", "1", "2"]
    expected = torch.stack([TO_TENSOR(data[i][0]) for _, i in rows])
    torch.testing.assert_close(source.take(torch.arange(24)), expected, atol=1e-6, rtol=0)
    with_decoder = ClassSource.from_dataset(data, pixels())
    torch.testing.assert_close(with_decoder.take(torch.arange(24)), 2 * expected - 1, atol=1e-6, rtol=0)


def test_labels_of_several_kinds_and_names_of_the_dataset():
    mixed = [(0.5, np.int64(4)), (1.5, torch.tensor([3])), (2.5, 4.0), (3.5, True)]
    source = ClassSource.from_dataset(mixed)
    assert source.names == ["1", "3", "4"]
    assert source.inputs.tolist() == [3.5, 1.5, 0.5, 2.5]
    assert ClassSource.from_dataset([(1.0, "bee"), (2.0, "ant"), (3.0, "bee")]).names == ["ant", "bee"]
    assert ClassSource.from_dataset(Named([(1.0, 2), (2.0, 0)])).names == ["ant", "cat"]
    assert ClassSource.from_dataset(DataLoader(Named([(1.0, 2), (2.0, 0)]))).names == ["ant", "cat"]
    assert ClassSource.from_dataset(Named([(1.0, 2), (2.0, 3)])).names == ["2", "3"]
    assert ClassSource.from_dataset(Named([(1.0, -1), (2.0, 0)])).names == ["-1", "0"]


GOOD = (torch.zeros(2), 0)
NOT_AN_INTEGER = [2.5, "3", None, float("nan"), float("inf"), [1], torch.tensor([0, 1]), b"1"]
NO_PAIR = "is not an (input, label) pair"
WHOLE = "whole tensors of inputs and labels go to ClassSource(inputs, labels)"
NO_DATASET = (
    "is no dataset: expected one with __getitem__ and __len__, an iterable of (input, label) pairs, "
    "or a DataLoader"
)
NO_INPUT = "expected a tensor, an array, a PIL image or numbers"
REFUSED = [
    ([], "the dataset is empty"),
    (Stream([]), "the dataset is empty"),
    (iter(()), "the dataset is empty"),
    (DataLoader(Stream([])), "the dataset is empty"),
    ([GOOD, 7], f"item 1 of the dataset {NO_PAIR}: 7; {WHOLE}"),
    ([(1, 2, 3)], f"item 0 of the dataset {NO_PAIR}: (1, 2, 3); {WHOLE}"),
    ([{"image": 1}], f"item 0 of the dataset {NO_PAIR}: {{'image': 1}}; {WHOLE}"),
    ((torch.zeros(2), torch.zeros(2)), f"item 0 of the dataset {NO_PAIR}: tensor([0., 0.]); {WHOLE}"),
    ({"a": GOOD}, "a dict is no dataset; give its (input, label) pairs, or ClassSource(inputs, labels)"),
    (None, f"a NoneType {NO_DATASET}"),
    (7, f"a int {NO_DATASET}"),
    (Endless(), "the dataset Endless has no length: give it a method __len__"),
    ([GOOD, ("word", 0)], f"item 1 of the dataset has the input 'word', {NO_INPUT}"),
    ([(None, 0)], f"item 0 of the dataset has the input None, {NO_INPUT}"),
    ([(np.array(["a"]), 0)], f"item 0 of the dataset has the input array(['a'], dtype='<U1'), {NO_INPUT}"),
    ([GOOD, (torch.zeros(3), 0)],
     "item 1 of the dataset has shape (3,), the first has (2,): resize them to one shape first"),
    ([(of_mode("RGB"), 0), (of_mode("RGB").resize((9, 6)), 0)],
     "item 1 of the dataset has shape (3, 6, 9), the first has (3, 6, 4): resize them to one shape first"),
    ([(of_mode("L"), 0), (of_mode("RGB"), 0)],
     "item 1 of the dataset is an image of mode RGB, the first is an image of mode L: convert them to one mode first"),
    ([(of_mode("L"), 0), (Image.fromarray(SIXTEEN), 0)],
     "item 1 of the dataset is an image of mode I;16, the first is an image of mode L: "
     "convert them to one mode first"),
    *(([GOOD, GOOD, (torch.zeros(2), label)], f"item 2 of the dataset has the label {label!r}, not an integer")
      for label in NOT_AN_INTEGER),
    ([(torch.zeros(2), "a"), GOOD], "item 1 of the dataset has the label 0, the first 'a'"),
    ([GOOD, (torch.tensor([1.0, torch.nan]), 4), (torch.tensor([1.0, torch.inf]), 0)],
     "example 1 of the data, of class '4', holds nan or infinite numbers; mend it or leave it out"),
    (Named([(1.0, 0), (torch.inf, 1)]),
     "example 1 of the data, of class 'bee', holds nan or infinite numbers; mend it or leave it out"),
    (DataLoader(PAIRS, sampler=RandomSampler(PAIRS, replacement=True)),
     "the DataLoader draws with replacement, so that an example could be in the support and the query set of a "
     "task; give its dataset"),
    (DataLoader([torch.zeros(2)] * 3),
     "batch 0 of the DataLoader is not a pair of as many inputs as labels: tensor([[0., 0.]])"),
]  # fmt: skip


@pytest.mark.parametrize(("dataset", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
@pytest.mark.parametrize("read", [ClassSource.from_dataset, partial(fomaml_train, MLP(2, 2))])
def test_what_cannot_be_read_is_one_line(dataset, message, read):
    options = {} if read == ClassSource.from_dataset else {
        "num_iterations": 1, "num_inner_updates": 1, "inner_lr": 0.1, "meta_lr": 0.1
    }  # fmt: skip
    with pytest.raises(InputError) as error:
        read(dataset, **options)
    assert str(error.value) == message


@pytest.mark.parametrize("inputs", [[of_mode("L")] * 2, [torch.zeros(2), torch.zeros(3)]])
def test_a_loader_that_cannot_batch_says_so(inputs):
    with pytest.raises(
        InputError, match=r"the DataLoader gave no batch 0 \(.+\); give its dataset$"
    ) as error:
        ClassSource.from_dataset(DataLoader([(each, 0) for each in inputs], batch_size=2))
    assert "\n" not in str(error.value)


def pairs(kind, classes=3, each=4):
    """Examples of an input of `IMAGES`, their labels of as many classes."""
    return [(IMAGES[kind][0], label) for label in range(classes) for _ in range(each)]


LEARNED = {
    **{kind: partial(pairs, kind) for kind in IMAGES if kind[0] in "1LPRCHIFbf"},
    "loader": lambda: DataLoader(pairs("floats"), batch_size=5, shuffle=True),
    "stream": lambda: Stream(pairs("P")),
    "generator": lambda: iter(pairs("I;16")),
    "float64": lambda: ClassSource(RANDOM.normal(size=(12, 5)), np.arange(12) // 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LEARNED)
def test_fomaml_train_learns_from_it(kind, dtype):
    dataset = LEARNED[kind]()
    first = IMAGES[kind][1] if kind in IMAGES else {"loader": IMAGES["floats"][1], "stream": IMAGES["P"][1],
        "generator": IMAGES["I;16"][1], "float64": torch.zeros(5)}[kind]  # fmt: skip
    model = MLP(first.numel(), 3).to(dtype)
    before = model[1].bias.clone()
    losses = fomaml_train(
        model, dataset, 2, 1, 0.1, 0.1, ways=3, shots=1, query_shots=2, meta_batch_size=2, report=len
    )
    assert all(0 < loss < 100 for loss in losses) and not torch.equal(model[1].bias, before)


class Scaled(MLP):
    """A model that converts its inputs itself."""

    def forward(self, inputs):
        return super().forward(inputs.float() / 255)


BYTES = TensorDataset(torch.arange(240, dtype=torch.uint8).view(12, 1, 4, 5), torch.arange(12) // 4)
FEW = {"ways": 3, "shots": 1, "query_shots": 2, "meta_batch_size": 2, "report": len}


def test_bytes_of_a_tensor_are_the_models_own_matter():
    assert len(fomaml_train(Scaled(20, 3), BYTES, 2, 1, 0.1, 0.1, **FEW)) == 2
    with pytest.raises(
        InputError, match=r"the inputs are torch\.uint8 and .*, or decode images as pixels\(\)"
    ):
        fomaml_train(MLP(20, 3), BYTES, 2, 1, 0.1, 0.1, **FEW)
    decoded = ClassSource.from_dataset(BYTES, decode=pixels())
    assert len(fomaml_train(MLP(20, 3), decoded, 2, 1, 0.1, 0.1, **FEW)) == 2


def test_an_error_of_the_models_own_is_told_as_it_is():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        fomaml_train(MLP(7, 3), pairs("floats"), 2, 1, 0.1, 0.1, **FEW)
