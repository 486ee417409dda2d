"""Arrays whose first axis is rows, in memory or mapped from a file: only the rows that are drawn are read."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fomaml.errors import InputError, in_one_line

AT_ONCE = 4096  # rows that are read together where all are looked at


def each(given: Any, leaf: Callable[[Any, str], Any], name: str = "") -> Any:
    """The nesting with `leaf` of each (value, name); dicts and tuples nest, a list is a value."""
    if isinstance(given, Mapping):
        return {key: each(value, leaf, f"{name}[{key!r}]") for key, value in given.items()}
    if isinstance(given, tuple):
        parts = [each(value, leaf, f"{name}[{number}]") for number, value in enumerate(given)]
        return type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)
    return leaf(given, name)


class Rows:
    """Nested arrays of equally many rows.

    given: arrays, tensors, or what has `shape`, `dtype` and `array[rows]` as they do; or dicts and tuples of these.
        A memory-mapped array is never read as a whole. Whole numbers keep their dtype, floating ones become torch's
        default dtype when they are drawn.
    name: of all of them, for messages.

    Raises:
        InputError: no arrays, object arrays, text, arrays of different lengths or without rows; numbers in memory that
            are nan or infinite. Those of a mapped array are found when they are drawn.
    """

    def __init__(self, given: Any, name: str):
        self.name = name
        self.found: list[tuple[str, Any]] = []

        def leaf(value: Any, place: str) -> Any:
            array = as_array(value, place)
            self.found.append((place, array))
            return array

        self.tree = each(given, leaf, name)
        if not self.found:
            raise InputError(f"the {name} hold no arrays")
        lengths = {place: array.shape[0] for place, array in self.found}
        if len(set(lengths.values())) > 1:
            told = " and ".join(f"{place} has {length}" for place, length in lengths.items())
            raise InputError(f"arrays of different lengths: {told} rows")
        for place, array in self.found:
            if in_memory(array):
                check_finite(array, place)

    def __getstate__(self) -> dict:
        return vars(self) | {"tree": each(self.tree, lambda array, _: Held(array)), "found": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.found = []

        def leaf(held: Held, place: str) -> Any:
            self.found.append((place, held.value))
            return held.value

        self.tree = each(self.tree, leaf, self.name)

    def __len__(self) -> int:
        return self.found[0][1].shape[0]

    @property
    def alone(self) -> bool:
        """Whether it is one array, no nesting of them."""
        return not isinstance(self.tree, dict | tuple)

    def shapes(self) -> Any:
        """The nesting of the arrays' shapes without their first axis."""
        return each(self.tree, lambda array, place: tuple(array.shape[1:]), self.name)

    def take(
        self,
        rows: np.ndarray,
        change: Callable[[Tensor, str], Tensor] = lambda drawn, place: drawn,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The nesting of tensors of these rows, any of them more than once.

        change: (tensor, name) → tensor, of floating ones, in float64 unless they are kept as a tensor; "" and
            "['mask']" are such names. dtype: of floating ones; by default torch's, or that of the tensor kept.
        """

        def leaf(array: Any, place: str) -> Tensor:
            drawn = read(array, rows)
            if not in_memory(array):
                check_finite(drawn, place, rows)
            if drawn.is_floating_point():
                own = drawn.dtype if isinstance(array, Tensor) else torch.get_default_dtype()
                drawn = change(drawn, place.removeprefix(self.name)).to(dtype or own)
            return drawn

        return each(self.tree, leaf, self.name)


def as_array(value: Any, place: str) -> Any:
    """The value as something that rows can be taken from: as it is if it can, else as a numpy array.

    Raises:
        InputError: it is no array of numbers, or has no rows.
    """
    if not isinstance(value, Tensor):
        try:
            if not is_array(value):
                value = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"the {place} must be an array of numbers ({in_one_line(error)})") from None
        kind = np.dtype(value.dtype).kind
        if kind == "O":
            raise InputError(
                f"the {place} are an object array, which may hold anything and is not read: make it one array of "
                "numbers, where rows of unequal length stand one after the other beside their lengths"
            )
        if kind not in "biufc":
            what = "text" if kind in "SU" else f"of dtype {value.dtype}"
            raise InputError(f"the {place} are {what}, expected numbers: give each text a whole number")
    if len(value.shape) == 0 or value.shape[0] == 0:
        raise InputError(f"the {place} have no rows, got shape {tuple(value.shape)}")
    return value


def is_array(value: Any) -> bool:
    """Whether it is one of numpy's, or can be read as such; what pandas and polars have goes by other rules."""
    try:
        np.dtype(value.dtype)
    except (AttributeError, TypeError):
        return False
    return hasattr(value, "shape") and hasattr(value, "__getitem__") and not hasattr(value, "iloc")


def in_memory(array: Any) -> bool:
    """Whether all of it may be looked at for little."""
    return isinstance(array, Tensor) or (type(array) is np.ndarray and not _is_mapped(array))


def _is_mapped(array: Any) -> bool:
    """Whether an array, or what it is a view of, is mapped from a file."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return array is not None and type(array).__name__ == "mmap"


class Held:
    """Any object; in a pickle a mapped array goes by the name of its file, so that a worker process maps it too.

    Numpy writes all its numbers, as here those of a part of a mapped array.

    Raises, when it is unpickled:
        InputError: the file is no longer there, or has become shorter.
    """

    def __init__(self, value: Any):
        self.value = value

    def __reduce__(self) -> tuple:
        value = self.value
        if not (isinstance(value, np.memmap) and isinstance(value.base, mmap.mmap) and value.filename):
            return Held, (value,)
        value.flush()
        order = "C" if value.flags.c_contiguous else "F"
        return _mapped_anew, (str(value.filename), value.dtype, "r", value.offset, value.shape, order)


def _mapped_anew(path: str, *how: Any) -> Held:
    try:
        return Held(np.memmap(path, *how))
    except (OSError, ValueError) as error:
        raise InputError(
            f"the array of a pickled source is no longer in {path} ({in_one_line(error)}): make the source anew"
        ) from error


def read(array: Any, rows: np.ndarray) -> Tensor:
    """These rows, floating ones in float64 unless they are a tensor. Each is read once, in ascending order."""
    if isinstance(array, Tensor):
        return array[torch.from_numpy(np.asarray(rows)).to(array.device)]
    drawn = taken(array, rows)
    kind = drawn.dtype.kind
    if kind == "f":
        drawn = drawn.astype(np.float64)
    elif kind == "u" and drawn.dtype.itemsize > 1:  # of which torch has little
        drawn = drawn.astype(np.int64 if drawn.dtype.itemsize > 2 else np.int32)
    return torch.from_numpy(drawn)


def taken(array: Any, rows: np.ndarray) -> np.ndarray:
    """A copy of these rows, in the machine's byte order. Each is read once, in ascending order."""
    once, back = np.unique(rows, return_inverse=True)
    return native(np.asarray(array[once])[back])


def native(array: np.ndarray) -> np.ndarray:
    """The array as torch takes it: in the machine's byte order, its rows one after the other."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def check_finite(array: Any, place: str, rows: np.ndarray | None = None) -> None:
    """Raise `InputError` where numbers are nan or infinite. rows: the rows that these are of a larger array."""
    for start in range(0, array.shape[0], AT_ONCE):
        part = array[start : start + AT_ONCE]
        finite = np.isfinite(part) if isinstance(part, np.ndarray) else part.isfinite().cpu().numpy()
        if not finite.all():
            bad = start + int(np.argmin(finite.reshape(len(finite), -1).all(1)))
            raise InputError(
                f"row {bad if rows is None else int(rows[bad])} of the {place}, counted from 0, holds nan or infinite "
                "numbers; mend it or leave it out"
            )
