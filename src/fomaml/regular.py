"""Files that others have made: regular ones alone are opened, and no more of them is read than they may hold."""

from __future__ import annotations

import gzip
import stat
from pathlib import Path

from fomaml.errors import InputError
from fomaml.memory import in_units

SMALL = 2**28  # bytes of a text, or of an archive of small pictures, and of what it expands to
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def regular(path: str | Path) -> Path:
    """The path, unless it is a pipe, a device or a socket, which may never end.

    Raises:
        InputError: it is one.
        OSError: it is not there, or cannot be looked at.
    """
    path = Path(path)
    kind = KINDS.get(stat.S_IFMT(path.stat().st_mode))
    if kind is not None:
        raise InputError(f"{path} is {kind}, expected an ordinary file")
    return path


def read_bytes(path: str | Path, most: int = SMALL) -> bytes:
    """The bytes of a regular file of at most so many.

    Raises:
        InputError: it is none, or larger.
        OSError: as of `open`.
    """
    with open(regular(path), "rb") as file:
        found = file.read(most + 1)
    return _limited(found, path, most, "is larger than")


def read_text(path: str | Path, most: int = SMALL) -> str:
    """The text, UTF-8, of such a file; errors as of `read_bytes`, and UnicodeDecodeError."""
    return read_bytes(path, most).decode()


def expanded(path: str | Path, most: int = SMALL) -> bytes:
    """What a gzip file expands to, at most so many bytes.

    Raises:
        InputError: it is no regular file, or expands to more.
        OSError, EOFError, zlib.error: as of `gzip`.
    """
    with gzip.open(regular(path), "rb") as file:
        found = file.read(most + 1)
    return _limited(found, path, most, "expands to more than")


def _limited(found: bytes, path: str | Path, most: int, told: str) -> bytes:
    if len(found) > most:
        raise InputError(f"{path} {told} the {in_units(most)} that such a file may hold")
    return found
