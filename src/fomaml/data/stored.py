"""Inputs that stay where they are, in a mapped array or in files: rows become tensors when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fomaml.data.rows import Held, as_array, check_finite, in_memory, is_array, taken
from fomaml.errors import InputError

Change: TypeAlias = Callable[[Tensor], Tensor]


class Stored:
    """Rows of an array in an order of their own. `inputs[indices]` reads these and no others, each of them once.

    array: mapped from a file, or anything with `shape`, `dtype` and `array[rows]`; or `Stored` inputs.
    rows: int64, the row of the array that each of the inputs is.
    change: maps tensors (n, ...) of rows to as many of the same shape and dtype, each row by itself.

    Attributes:
        shape, dtype, device: as of a tensor.

    Raises, when rows are read:
        InputError: nan or infinite numbers, with the row of the array.
    """

    def __init__(self, array: Any, rows: np.ndarray, change: Change | None = None):
        self.array, self.rows, self.change = array, rows, change
        self.shape = torch.Size((len(rows), *array.shape[1:]))
        self.dtype: torch.dtype = array.dtype if isinstance(array, Stored | _Several) else _dtype_of(array)
        self.device = torch.device("cpu")

    def __getstate__(self) -> dict:
        return vars(self) | {"array": Held(self.array)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, array=state["array"].value)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def reads_aside(self) -> bool:
        """Whether another thread may read rows: no function or object of the user's is called."""
        return self.change is None and (
            isinstance(self.array, np.memmap) or getattr(self.array, "reads_aside", False)
        )

    def __getitem__(self, indices: Tensor | np.ndarray | slice | int) -> Tensor:
        """(*indices.shape, ...) the inputs at indices of any shape, a new tensor on `device`."""
        index = indices.cpu().numpy() if isinstance(indices, Tensor) else indices
        rows = np.asarray(self.rows[index])
        found = _read(self.array, rows.reshape(-1))
        if self.change is not None:
            found = _checked(self.change(found), found)
        return found.view(*rows.shape, *self.shape[1:]).to(self.device)

    def split(self, size: int) -> Iterator[Tensor]:
        """All of them in order, so many at once, as `Tensor.split`."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def to(self, device: torch.device | str) -> Stored:
        """The same, whose tensors are on `device`."""
        moved = copy(self)
        moved.device = torch.device(device)
        return moved


Inputs: TypeAlias = Tensor | Stored


class _Several:
    """Stored inputs and tensors of one shape and dtype, one after the other."""

    def __init__(self, parts: Sequence[Inputs]):
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        self.shape = torch.Size((int(self.ends[-1]), *parts[0].shape[1:]))
        self.dtype = parts[0].dtype

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        found = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        own = np.searchsorted(self.ends, rows, side="right")
        for number in np.unique(own):
            part = self.parts[number]
            places = np.flatnonzero(own == number)
            within = torch.from_numpy(rows[places] - (self.ends[number] - len(part)))
            found[torch.from_numpy(places)] = part[
                within.to(part.device)
            ].cpu()  # of tensors that are elsewhere
        return found


def stored(given: Any) -> Stored | None:
    """All rows of an array that is not in memory; None for tensors, arrays in memory and what is no array.

    Raises:
        InputError: objects or text, no rows, numbers of a kind that torch does not have.
    """
    if isinstance(given, Tensor) or not is_array(given) or not len(given.shape) or in_memory(given):
        return None
    array = as_array(given, "inputs")
    return Stored(array, np.arange(array.shape[0]))


def some(inputs: Inputs, rows: Tensor) -> Inputs:
    """The inputs of these rows, in their order; of stored ones nothing is read."""
    if isinstance(inputs, Tensor):
        return inputs[rows.to(inputs.device)]
    chosen = Stored(inputs.array, inputs.rows[rows.cpu().numpy()], inputs.change)
    return chosen.to(inputs.device)


def changed(inputs: Inputs, change: Change) -> Inputs:
    """What `change` makes of all inputs, as many of the same shape and dtype; of stored ones when they are read.

    Raises:
        InputError: it gives another shape, number or dtype.
    """
    if isinstance(inputs, Tensor):
        return _checked(change(inputs), inputs)
    return Stored(inputs.to("cpu"), np.arange(len(inputs)), change).to(inputs.device)


def in_a_row(parts: Sequence[Inputs]) -> Inputs:
    """All of them, one after the other; if some are stored, nothing is read."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    whole = _Several([part if isinstance(part, Tensor) else part.to("cpu") for part in parts])
    return Stored(whole, np.arange(whole.shape[0])).to(parts[0].device)


def _read(array: Any, rows: np.ndarray) -> Tensor:
    if isinstance(array, Stored | _Several):
        return array[rows]
    drawn = taken(array, rows)
    check_finite(drawn, "inputs", rows)
    return torch.from_numpy(drawn)


def _checked(found: Any, before: Tensor) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != before.shape or found.dtype != before.dtype:
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"a transform of {before.dtype} {tuple(before.shape)} must give as many inputs of the same shape and "
            f"dtype, got {what}"
        )
    return found


def _dtype_of(array: Any) -> torch.dtype:
    """In which torch has its numbers."""
    native = np.dtype(array.dtype).newbyteorder("=")
    try:
        return torch.from_numpy(np.empty(0, native)).dtype
    except TypeError:
        raise InputError(
            f"the inputs are of dtype {native}, which torch has no numbers of; convert them to float32 or float64"
        ) from None
