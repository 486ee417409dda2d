"""The error a user can mend: one line that says what was given, what was expected, and the cure."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: an option, a data file, a module or a run directory. The message is one line.

    The library raises it; the command line prints the same text and exits with status 2.
    """


def positive(name: str, value, integer: bool = False):
    """Return `value` if it is a positive (whole) number, else raise `InputError` naming it."""
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        wanted = "a whole number of 1 or more" if integer else "a positive finite number"
        raise InputError(f"{name} must be {wanted}, got {value!r}")
    return value


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Within a command: bad input is one line on standard error, and the exit status 2."""
    try:
        yield
    except InputError as error:
        print(f"fomaml: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
