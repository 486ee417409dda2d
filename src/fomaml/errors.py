"""The error a user can mend: one line that says what was given, what was expected, and the cure."""

from __future__ import annotations

import textwrap
from typing import TypeVar

Number = TypeVar("Number", bound=float)


class InputError(ValueError):
    """Bad input: an option, a data file, a module or a run directory. The message is one line.

    The library raises it, the command line prints the same text and exits with status 2.
    """


def positive(name: str, value: Number, integer: bool = False) -> Number:
    """Return `value` if it is a positive (whole) number, else raise `InputError` naming it."""
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        wanted = "a whole number of 1 or more" if integer else "a positive finite number"
        raise InputError(f"{name} must be {wanted}, got {value!r}")
    return value


def in_one_line(error: BaseException) -> str:
    """An exception in one line: its kind, unless it is an `InputError`, and the first sentence of its message."""
    lines = str(error).strip().splitlines() or ["no message"]
    text = textwrap.shorten(lines[0].split(". ")[0], 160, placeholder=" ...")
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
