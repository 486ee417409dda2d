"""Any labelled dataset, read once: its examples as tensors of one shape and labels as numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fomaml.errors import InputError, plain, shown

MOST = {"uint8": 255, "uint16": 65535}  # what is white, by the dtype of an image's numbers


class Input(NamedTuple):
    """An input as it is kept. most: the number that is white where it is an image, else None. kind: in words."""

    value: Tensor
    most: int | None
    kind: str


class Read(NamedTuple):
    """A whole dataset. names: of the classes, in ascending order of label, where it has any."""

    inputs: Tensor
    labels: list[int]
    names: list[str] | None
    most: int | None


def read(dataset: Any) -> Read:
    """Read all (input, label) pairs of a dataset, an iterable or a `DataLoader`; see `ClassSource.from_dataset`."""
    inputs: list[Tensor] = []
    labels: list[Any] = []
    first: Input | None = None
    for index, item in enumerate(_items(dataset)):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(
                f"item {index} of the dataset is not an (input, label) pair: {shown(item)}; "
                "whole tensors of inputs and labels go to ClassSource(inputs, labels)"
            )
        found = _input(item[0], index)
        first = first or found
        _check_alike(found, first, index)
        inputs.append(found.value)
        labels.append(_label(item[1], index, labels))
    if first is None:
        raise InputError("the dataset is empty")
    if isinstance(labels[0], str):
        numbers = {name: number for number, name in enumerate(sorted(set(labels)))}
        return Read(torch.stack(inputs), [numbers[label] for label in labels], list(numbers), first.most)
    return Read(torch.stack(inputs), labels, _names(dataset, sorted(set(labels))), first.most)


def _items(dataset: Any) -> Iterator[Any]:
    """The items of a dataset, one after the other."""
    if isinstance(dataset, DataLoader):
        return _of_loader(dataset)
    if isinstance(dataset, Mapping):
        raise InputError(
            f"a {type(dataset).__name__} is no dataset; give its (input, label) pairs, or "
            "ClassSource(inputs, labels)"
        )
    if hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset):
        if not hasattr(dataset, "__len__"):
            raise InputError(f"the dataset {type(dataset).__name__} has no length: give it a method __len__")
        return (dataset[index] for index in range(len(dataset)))
    if isinstance(dataset, Iterable):
        return iter(dataset)
    raise InputError(
        f"a {type(dataset).__name__} is no dataset: expected one with __getitem__ and __len__, an iterable of "
        "(input, label) pairs, or a DataLoader"
    )


def _of_loader(loader: DataLoader) -> Iterator[Any]:
    """The examples of a loader's batches, those that its sampler gives."""
    if getattr(loader.sampler, "replacement", False):
        raise InputError(
            "the DataLoader draws with replacement, so that an example could be in the support and the query "
            "set of a task; give its dataset"
        )
    batches = iter(loader)
    for number in range(2**63):
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (
            TypeError,
            RuntimeError,
        ) as error:  # of torch's default_collate, in the main: images, unequal shapes
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"the DataLoader gave no batch {number} ({reason}); give its dataset") from error
        if loader.batch_sampler is None:  # it does not batch
            yield batch
            continue
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or len(batch[0]) != len(batch[1]):
            raise InputError(
                f"batch {number} of the DataLoader is not a pair of as many inputs as labels: {shown(batch)}"
            )
        yield from zip(*batch)


def _check_alike(found: Input, first: Input, index: int) -> None:
    if found.value.shape == first.value.shape and found.most == first.most:
        return
    if found.kind != first.kind and found.value.shape[-2:] == first.value.shape[-2:]:
        raise InputError(
            f"item {index} of the dataset is {found.kind}, the first is {first.kind}: convert them to one mode first"
        )
    raise InputError(
        f"item {index} of the dataset has shape {tuple(found.value.shape)}, the first has "
        f"{tuple(first.value.shape)}: resize them to one shape first"
    )


def _input(value: Any, index: int) -> Input:
    if isinstance(value, Tensor):
        return Input(value.detach().as_subclass(Tensor), None, "a tensor")
    if hasattr(value, "getbands"):  # a PIL image
        return _image(_pixels(value), f"an image of mode {value.mode}")
    if isinstance(value, np.ndarray) and value.ndim > 1 and value.dtype.name in ("bool", *MOST):
        return _image(value, f"an array of {value.dtype}")
    try:
        if isinstance(value, np.ndarray):
            value = np.array(
                value, value.dtype.newbyteorder("=")
            )  # a copy: it may be read-only, or run backwards
        return Input(torch.as_tensor(value), None, "a tensor")
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"item {index} of the dataset has the input {shown(value)}, expected a tensor, an array, a PIL image "
            "or numbers"
        ) from None


def _pixels(image: Any) -> np.ndarray:
    """The numbers of a PIL image: (height, width) or (height, width, channels)."""
    if image.mode in ("P", "PA"):  # a palette: its numbers are no colours
        from PIL import Image

        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image)


def _image(array: np.ndarray, kind: str) -> Input:
    """An image with its channels first: uint8, int32 where its numbers have 16 bits, else as they are."""
    if array.dtype == bool:
        array = np.uint8(255) * array
    most = MOST.get(array.dtype.name)
    array = array.astype(np.int32 if most == 65535 else array.dtype.newbyteorder("="))
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[-1] <= 4:
        array = array.transpose(2, 0, 1)
    return Input(torch.from_numpy(np.ascontiguousarray(array)), most, kind)


def _label(value: Any, index: int, others: Sequence[Any]) -> int | str:
    """The label as a number, or as it is where the first of the dataset is a string too."""
    if isinstance(value, str):
        if not others or isinstance(others[0], str):
            return str(value)
    elif others and isinstance(others[0], str):
        raise InputError(f"item {index} of the dataset has the label {shown(value)}, the first {others[0]!r}")
    number = (
        value.item()
        if isinstance(value, (Tensor, np.ndarray)) and value.shape in ((), (1,))
        else plain(value)
    )
    try:
        label = int(number)
    except (TypeError, ValueError, OverflowError):  # the last: infinity
        label = None
    if label is None or label != number:
        raise InputError(f"item {index} of the dataset has the label {shown(value)}, not an integer")
    return label


def _names(dataset: Any, present: list[int]) -> list[str] | None:
    """The names that the dataset has for the labels that are there."""
    known = getattr(dataset.dataset if isinstance(dataset, DataLoader) else dataset, "classes", None)
    if not isinstance(known, Sequence) or present[0] < 0 or present[-1] >= len(known):
        return None
    return [str(known[label]) for label in present]
