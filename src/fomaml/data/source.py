"""Labelled examples grouped by class: what every classification task is drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fomaml.blocks import empty
from fomaml.data.reading import read
from fomaml.data.stored import Inputs, Stored, changed, in_a_row, some, stored
from fomaml.errors import InputError, in_one_line, whole
from fomaml.threads import in_parts


class ClassSource:
    """Examples sorted by class, decoded only when they are drawn.

    Arguments:
        inputs: (examples, ...) of any dtype, a tensor or an array; images stay uint8 here, a quarter of their
            float size. A memory-mapped array (`np.load(…, mmap_mode="r")`), or anything else with `shape`, `dtype` and
            `array[rows]`, stays where it is: only the rows that are drawn are read.
        targets: (examples,) integer labels, in any order and with any values.
        names: one name per class, in ascending order of label; by default the label as text.
        decode: maps drawn inputs (a batch, on their device) to what the model takes, for example
            `pixels` below. By default they are passed on as they are.

    Attributes:
        inputs: the inputs, sorted by class: a tensor, or what `inputs[rows]` reads tensors from, see `Stored`.
        offsets, counts: (classes,) int64 on the CPU; class c holds rows offsets[c] … + counts[c] - 1.
        names: the class names.

    Raises:
        InputError: no examples, targets that are not integers, lengths that differ, or an input that is nan or
            infinite, with its number and class; of inputs that are not in memory when it is drawn, with its number.
    """

    inputs: Inputs

    def __init__(
        self,
        inputs: Any,
        targets: Any,
        names: Sequence[str] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        kept = inputs if isinstance(inputs, Stored) else stored(inputs)
        try:
            inputs = torch.as_tensor(inputs) if kept is None else kept
            # a copy of an array: torch warns of one that is read-only, as mapped ones are
            targets = torch.as_tensor(np.array(targets) if isinstance(targets, np.ndarray) else targets).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"inputs and targets must be tensors or arrays of numbers ({in_one_line(error)}); a dataset goes to "
                "ClassSource.from_dataset"
            ) from None
        if targets.is_floating_point() or targets.is_complex() or targets.dim() != 1:
            raise InputError(
                f"targets must be a vector of integer labels, got {targets.dtype} of shape "
                f"{tuple(targets.shape)}"
            )
        targets = targets.long()
        if not inputs.shape or len(inputs) != len(targets):
            raise InputError(f"{len(inputs) if inputs.shape else 'no'} inputs but {len(targets)} targets")
        if len(targets) == 0:
            raise InputError("a class source needs at least one example, got none")
        labels, counts = targets.unique(return_counts=True)
        order = targets.argsort(stable=True)
        self.inputs = some(inputs, order)
        self.counts = counts
        self.offsets = counts.cumsum(0) - counts
        self.names = [str(label) for label in labels.tolist()] if names is None else list(names)
        if len(self.names) != len(labels):
            raise InputError(f"{len(self.names)} class names for {len(labels)} classes")
        if isinstance(inputs, Tensor) and (bad := _first_not_finite(inputs)) is not None:
            name = self.names[int(torch.searchsorted(labels, targets[bad]))]
            raise InputError(
                f"example {bad} of the data, of class {name!r}, holds nan or infinite numbers; mend it or leave it out"
            )
        self.decode = decode

    @classmethod
    def from_dataset(cls, dataset: Any, decode: Callable[[Tensor], Tensor] | None = None) -> ClassSource:
        """Read a dataset of (input, label) pairs, any torchvision one included, into memory.

        dataset: one with `__getitem__` and `__len__`, an `IterableDataset` or another iterable that ends, or a
            `DataLoader`, whose batches are taken apart. Random transforms are frozen at the value of this reading.

        Inputs are tensors, arrays, PIL images or numbers, all of one shape. PIL images, and arrays of two or more
        dimensions of uint8, uint16 or bool, are images: whole numbers (channels, height, width) in memory and, without
        a `decode`, drawn in [0, 1], as torchvision's `ToTensor` gives them. An image with a palette is read in its
        colours, what is transparent on white; of an array (height, width, 1 to 4 channels) the channels are moved to
        the front, to one of (height, width) an axis is added. All else is drawn as it is.

        Labels are whole numbers, those of numpy and torch too, or strings. The dataset's own `classes` name the
        classes where it has them.

        Raises:
            InputError: the dataset is empty, an item is no pair, a label is no integer, or the
                inputs differ in shape, or hold nan or infinity.
        """
        found = read(dataset)
        if decode is None and found.most is not None:
            decode = pixels(0.0, 1.0, found.most)
        return cls(found.inputs, torch.tensor(found.labels), found.names, decode)

    def __len__(self) -> int:
        """The number of classes."""
        return len(self.names)

    @property
    def reads_aside(self) -> bool:
        """Whether another thread may read and decode inputs: no function or object of the user's is called."""
        own = self.decode is None or (isinstance(self.decode, partial) and self.decode.func is _scaled)
        return own and (isinstance(self.inputs, Tensor) or self.inputs.reads_aside)

    def take(self, indices: Tensor) -> Tensor:
        """The decoded inputs at `indices`, any shape of int64: (*indices.shape, *input shape)."""
        return self.take_each([indices])[0]

    def take_each(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """What `take` gives of each; inputs that are not in memory are read once for all of them."""
        if isinstance(self.inputs, Tensor):
            drawn = [_rows(self.inputs, part.to(self.inputs.device).flatten()) for part in indices]
        else:
            parts = [part.flatten() for part in indices]
            read = self.inputs[torch.cat(parts)].split([len(part) for part in parts])
            # copies, as of what is in memory: kernels may round by how their arguments are aligned
            drawn = [part.clone() for part in read]
        if self.decode is not None:
            drawn = [self.decode(part) for part in drawn]
        return [part.view(*own.shape, *part.shape[1:]) for own, part in zip(indices, drawn)]

    def labels(self) -> Tensor:
        """(examples,) the class number of each row of `inputs`."""
        return torch.arange(len(self)).repeat_interleave(self.counts)

    def select(self, classes: Iterable[int | str]) -> ClassSource:
        """Only these classes, by number or by name, in the order given.

        Raises:
            InputError: none, or a name that is not there; the message lists those that are.
        """
        numbers = [self._number(c) for c in classes]
        if not numbers:
            raise InputError(f"no classes selected; there are: {', '.join(self.names)}")
        rows = [torch.arange(self.offsets[n], self.offsets[n] + self.counts[n]) for n in numbers]
        labels = torch.arange(len(numbers)).repeat_interleave(self.counts[numbers])
        inputs = some(self.inputs, torch.cat(rows))
        return ClassSource(inputs, labels, [self.names[n] for n in numbers], self.decode)

    def joined(self, transforms: Sequence[tuple[str, Callable[[Tensor], Tensor]]]) -> ClassSource:
        """These classes and, for each (name, transform), a transformed copy of every one of them.

        transform: maps some of the stored inputs (examples, ...) to as many of the same shape and dtype, each by
            itself; all of them at once, or, if they are not in memory, those that are drawn.
        name: follows the class's own in the new name, as in "7 rot90".
        """
        labels = self.labels()
        parts = [(self.inputs, labels, self.names)]
        for number, (name, transform) in enumerate(transforms, start=1):
            names = [f"{own} {name}" for own in self.names]
            parts.append((changed(self.inputs, transform), labels + number * len(self), names))
        inputs, labels, names = zip(*parts)
        return ClassSource(
            in_a_row(inputs), torch.cat(labels), [n for part in names for n in part], self.decode
        )

    def to(self, device) -> ClassSource:
        """The same classes with their inputs on `device`."""
        moved = copy(self)
        moved.inputs = self.inputs.to(device)
        return moved

    def _number(self, key: int | str) -> int:
        if isinstance(key, str):
            if key not in self.names:
                raise InputError(f"no class {key!r} here; there are: {', '.join(self.names)}")
            return self.names.index(key)
        number = whole("a class", key, least=-math.inf, range=" or a name")
        if not 0 <= number < len(self):
            raise InputError(f"no class number {number} here; there are {len(self)}")
        return number


def pixels(mean: float = 0.5, std: float = 0.5, most: int = 255) -> Callable[[Tensor], Tensor]:
    """A decoder of images of whole numbers up to `most`: to [0, 1], then (x - mean) / std, in torch's default dtype."""
    return partial(_scaled, scale=1 / (most * std), shift=mean / std)


def _scaled(images: Tensor, scale: float, shift: float) -> Tensor:
    found = empty(images.shape, torch.get_default_dtype(), images.device)
    return found.copy_(images).mul_(scale).sub_(shift)


LARGE = 2**20  # bytes, from which on several threads gather faster


def _rows(inputs: Tensor, rows: Tensor) -> Tensor:
    # a quarter of the time that inputs[rows] takes
    found = empty((len(rows), *inputs.shape[1:]), inputs.dtype, inputs.device)
    # modes are of a thread: others would not write into what is made in inference mode
    if not inputs.is_cpu or found.nbytes < LARGE or found.is_inference():
        return torch.index_select(inputs, 0, rows, out=found)
    in_parts(lambda part: torch.index_select(inputs, 0, rows[part], out=found[part]), len(rows))
    return found


def _first_not_finite(inputs: Tensor) -> int | None:
    """The first example that holds nan or infinity."""
    if not (inputs.is_floating_point() or inputs.is_complex()):
        return None
    for start in range(0, len(inputs), 1024):  # a flag for each number: not all of them at once
        wrong = ~torch.isfinite(inputs[start : start + 1024].unsqueeze(-1)).flatten(1).all(1)
        if wrong.any():
            return start + int(wrong.nonzero()[0])
    return None
