"""The error a user can mend: one line that says what was given, what was expected, and the cure."""

from __future__ import annotations

import math
import numbers
import re
import textwrap
from typing import Any, Literal, overload


class InputError(ValueError):
    """Bad input: an option, a data file, a module or a run directory. The message is one line.

    The library raises it, the command line prints the same text and exits with status 2. What breaks lines, or is no
    text, as in names of files, is escaped.
    """

    def __init__(self, *told: Any):
        super().__init__(*(escaped(part) if isinstance(part, str) else part for part in told))


def plain(value: Any) -> Any:
    """A number of any kind as Python's int or float: numpy's, torch's without dimensions. Anything else as it is.

    A tensor that requires a gradient is no number: as a number it would be cut off from what it depends on.
    """
    if getattr(value, "ndim", None) == 0 and not getattr(value, "requires_grad", False):
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


@overload
def positive(name: str, value: float, integer: Literal[True]) -> int: ...
@overload
def positive(name: str, value: float, integer: Literal[False] = False) -> float: ...
def positive(name: str, value: float, integer: bool = False) -> float:
    """Return `value` as Python's number if it is a positive (whole) one, else raise `InputError` naming it."""
    if integer:
        return whole(name, value, 1)
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
        raise InputError(f"{name} must be a positive finite number, got {shown(number)}")
    return number


def not_negative(name: str, value: float) -> float:
    """Return `value` as Python's number if it is 0 or a positive one, else raise `InputError` naming it."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < math.inf:
        raise InputError(f"{name} must be a finite number of 0 or more, got {shown(number)}")
    return number


def whole(name: str, value: float, least: float = 0, below: float = math.inf, range: str = "") -> int:
    """Return `value` as Python's int if it is a whole number from `least`, else raise `InputError` naming it.

    range: the bounds in words, where `least` alone does not say them.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number < below:
        range = range or (f" of {least} or more" if least > -math.inf else "")
        raise InputError(f"{name} must be a whole number{range}, got {shown(number)}")
    return number


def escaped(text: str) -> str:
    """A text with its line breaks, control characters and surrogates as escapes: names of files may have any."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)


def shown(value: Any) -> str:
    """A value in a message: in one line, and not a long one."""
    text = repr(value)
    short = textwrap.shorten(text, 100, placeholder=" ...")
    return short if short != "..." else f"{text[:95]} ..."  # one long word


def in_one_line(error: BaseException) -> str:
    """An exception in one line: its kind, unless it is an `InputError`, and the first sentence of its message."""
    lines = str(error).strip().splitlines() or ["no message"]
    text = textwrap.shorten(lines[0].split(". ")[0], 160, placeholder=" ...")
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
