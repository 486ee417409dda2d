"""Columns that are no numbers to calculate with: task keys, class labels, what rows are ordered by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fomaml.errors import InputError, in_one_line, plain, shown

Kind = Literal["classification", "regression"]


def as_column(given: Any, name: str) -> np.ndarray:
    """One value for each row, as a numpy array.

    Raises:
        InputError: something else, or objects that are no text.
    """
    try:
        array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the {name} must be one value for each row ({in_one_line(error)})") from None
    if array.ndim != 1:
        raise InputError(f"the {name} must be one value for each row, got shape {array.shape}")
    if array.dtype.kind in "OT":  # as pandas keeps text
        for row, value in enumerate(array):
            if value is None or value != value:
                raise InputError(f"the {name} lack a value in row {row}, counted from 0")
            if not isinstance(value, str | int | float | np.generic):
                raise InputError(
                    f"the {name} must be text or numbers, got an object array with {shown(value)}"
                )
        array = np.array([key_of(value) for value in array], dtype=str)
    if array.dtype.kind not in "biufSUMm":
        raise InputError(f"the {name} must be text or numbers, got dtype {array.dtype}")
    if array.dtype.kind in "fMm" and (missing := np.flatnonzero(array != array)).size:
        raise InputError(
            f"the {name} lack {missing.size} values, the first in row {missing[0]}, counted from 0"
        )
    return array


def key_of(value: Any) -> str:
    """A key or label as text: whole numbers without a point, of what kind they may be."""
    value = plain(value)
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def numbered(given: Any, name: str) -> tuple[list[str], np.ndarray]:
    """The different values as text, sorted as they were, and (rows,) the number of each row's."""
    values, codes = np.unique(as_column(given, name), return_inverse=True)
    keys = [key_of(value) for value in values]
    if len(set(keys)) < len(keys):
        raise InputError(
            f"the {name} hold different values that look the same as text, such as {_twice(keys)!r}"
        )
    return keys, codes


def _twice(keys: list[str]) -> str:
    return next(key for key in keys if keys.count(key) > 1)


def kind_of(targets: Any) -> Kind:
    """Regression where targets are nested or floating, else classification."""
    if isinstance(targets, dict | tuple):
        return "regression"
    if isinstance(targets, Tensor):
        floating = targets.is_floating_point() or targets.is_complex()
    else:
        floating = np.dtype(getattr(targets, "dtype", np.asarray(targets).dtype)).kind in "fc"
    return "regression" if floating else "classification"


def classes_of(targets: Any, classes: Sequence[Any] | None) -> tuple[np.ndarray, list[str]]:
    """(rows,) class numbers, and the classes' names.

    Raises:
        InputError: targets that are not one label for each row, one class only, labels that are no classes.
    """
    if isinstance(targets, dict | tuple):
        raise InputError("classification has one label for each row, got a nesting of targets")
    names, numbers = numbered(targets, "targets")
    if classes is not None:
        known = [key_of(value) for value in classes]
        if other := [name for name in names if name not in known]:
            raise InputError(f"the target {other[0]!r} is none of the classes {few(known)}")
        numbers = np.array([known.index(name) for name in names])[numbers]
        names = known
    if len(names) < 2:
        raise InputError(
            f"all {len(numbers)} targets are the same class, {names[0]!r}: two or more are needed"
        )
    return numbers.astype(np.int64), names


def ranks(order: Any) -> np.ndarray:
    """What rows are sorted by: numbers or dates."""
    column = as_column(order, "order")
    if column.dtype.kind in "SU":
        raise InputError(
            f"the order must be numbers or dates, got text such as {shown(key_of(column[0]))}, of which '10' comes "
            "before '9'"
        )
    return column


def few(names: Sequence[str], most: int = 8) -> str:
    """The first few names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
