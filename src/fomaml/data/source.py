"""Labelled examples grouped by class: what every classification task is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fomaml.errors import InputError


class ClassSource:
    """Examples in memory, sorted by class, decoded only when they are drawn.

    Arguments:
        inputs: (examples, ...) of any dtype; images stay uint8 here, a quarter of their float size.
        targets: (examples,) integer labels, in any order and with any values.
        names: one name per class, in ascending order of label; by default the label as text.
        decode: maps drawn inputs (a batch, on their device) to what the model takes, for example
            `pixels` below. By default they are passed on as they are.

    Attributes:
        inputs: the inputs, sorted by class.
        offsets, counts: (classes,) int64 on the CPU; class c holds rows offsets[c] … + counts[c] - 1.
        names: the class names.

    Raises:
        InputError: no examples, targets that are not integers, or lengths that differ.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        names: Sequence[str] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        targets = torch.as_tensor(targets).cpu()
        if targets.is_floating_point() or targets.dim() != 1:
            raise InputError(
                f"targets must be a vector of integer labels, got {targets.dtype} of shape "
                f"{tuple(targets.shape)}"
            )
        if len(inputs) != len(targets):
            raise InputError(f"{len(inputs)} inputs but {len(targets)} targets")
        if len(targets) == 0:
            raise InputError("a class source needs at least one example, got none")
        labels, counts = targets.unique(return_counts=True)
        order = targets.argsort(stable=True)
        self.inputs = inputs[order.to(inputs.device)]
        self.counts = counts
        self.offsets = counts.cumsum(0) - counts
        self.names = [str(label) for label in labels.tolist()] if names is None else list(names)
        if len(self.names) != len(labels):
            raise InputError(f"{len(self.names)} class names for {len(labels)} classes")
        self.decode = decode

    @classmethod
    def from_dataset(cls, dataset, decode: Callable[[Tensor], Tensor] | None = None) -> ClassSource:
        """Read a map-style dataset of (input, integer label) pairs, any torchvision one included, into memory.

        Inputs may be tensors, numpy arrays, PIL images or numbers, all of one shape; a PIL image
        becomes a uint8 tensor (channels, height, width). The dataset's own `classes` name the
        classes where it has them. Random transforms are frozen at the value of this one reading.

        Raises:
            InputError: the dataset is empty, an item is no pair, a label is no integer, or the
                inputs differ in shape.
        """
        inputs: list[Tensor] = []
        targets: list[int] = []
        for index in range(len(dataset)):
            item = dataset[index]
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise InputError(f"item {index} of the dataset is not an (input, label) pair: {item!r:.80}")
            value = _as_tensor(item[0])
            if inputs and value.shape != inputs[0].shape:
                raise InputError(
                    f"item {index} of the dataset has shape {tuple(value.shape)}, the first has "
                    f"{tuple(inputs[0].shape)}: resize them to one shape first"
                )
            inputs.append(value)
            targets.append(_as_label(item[1], index))
        if not inputs:
            raise InputError("the dataset is empty")
        present = sorted(set(targets))
        known = getattr(dataset, "classes", None)
        names = None
        if known is not None and present[0] >= 0 and present[-1] < len(known):
            names = [str(known[label]) for label in present]
        return cls(torch.stack(inputs), torch.tensor(targets), names, decode)

    def __len__(self) -> int:
        """The number of classes."""
        return len(self.names)

    def take(self, indices: Tensor) -> Tensor:
        """The decoded inputs at `indices`, any shape of int64: (*indices.shape, *input shape)."""
        drawn = self.inputs[indices.to(self.inputs.device).flatten()]
        if self.decode is not None:
            drawn = self.decode(drawn)
        return drawn.view(*indices.shape, *drawn.shape[1:])

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
        rows = torch.cat(rows).to(self.inputs.device)
        return ClassSource(self.inputs[rows], labels, [self.names[n] for n in numbers], self.decode)

    def joined(self, transforms: Sequence[tuple[str, Callable[[Tensor], Tensor]]]) -> ClassSource:
        """These classes and, for each (name, transform), a transformed copy of every one of them.

        transform: maps the stored inputs (examples, ...) to as many of the same shape and dtype.
        name: follows the class's own in the new name, as in "7 rot90".
        """
        labels = self.labels()
        parts = [(self.inputs, labels, self.names)]
        for number, (name, transform) in enumerate(transforms, start=1):
            names = [f"{own} {name}" for own in self.names]
            parts.append((transform(self.inputs), labels + number * len(self), names))
        inputs, labels, names = zip(*parts)
        return ClassSource(
            torch.cat(inputs), torch.cat(labels), [n for part in names for n in part], self.decode
        )

    def to(self, device) -> ClassSource:
        """The same classes with their inputs on `device`."""
        return ClassSource(self.inputs.to(device), self.labels(), self.names, self.decode)

    def _number(self, key: int | str) -> int:
        if isinstance(key, str):
            if key not in self.names:
                raise InputError(f"no class {key!r} here; there are: {', '.join(self.names)}")
            return self.names.index(key)
        if not 0 <= key < len(self):
            raise InputError(f"no class number {key} here; there are {len(self)}")
        return key


def pixels(mean: float = 0.5, std: float = 0.5) -> Callable[[Tensor], Tensor]:
    """A decoder of uint8 images: to [0, 1], then (x - mean) / std, in torch's default dtype."""

    def decode(images: Tensor) -> Tensor:
        scale = 1 / (255 * std)
        return images.to(torch.get_default_dtype()).mul_(scale).sub_(mean / std)

    return decode


def _as_tensor(value) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "getbands"):  # a PIL image
        import numpy

        array = torch.from_numpy(numpy.array(value.convert("L") if value.mode == "1" else value))
        return array.unsqueeze(0) if array.dim() == 2 else array.permute(2, 0, 1)
    return torch.as_tensor(value)


def _as_label(value, index: int) -> int:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        label = int(value)
    except (TypeError, ValueError, OverflowError):  # the last: infinity
        label = None
    if label is None or label != value:
        raise InputError(f"item {index} of the dataset has the label {value!r}, not an integer")
    return label
