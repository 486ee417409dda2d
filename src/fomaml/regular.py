"""Files that anyone may have written: only ordinary ones are opened, and no more is read of them than is reasonable.

All bounds stand here. They are far above what this project and the libraries it reads from write, and low enough that
what is read, and what is made of it, takes less than 2 GB.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO, BinaryIO

from fomaml.errors import InputError

TEXT = 32 * 2**20  # bytes of a file of JSON or code; parsed, JSON takes up to twenty times that
LOG = 256 * 2**20  # bytes of a file with a line for each iteration or trial, of some 130 bytes: two million
LINE = 2**20  # bytes of one such line, and of the first line of a table
ARCHIVE = 64 * 2**20  # bytes of an archive that is read as a whole; Omniglot's larger one has 9.5 MB
MEMBER = 2**20  # bytes of a drawing in it, which has some 200
IDX = 512 * 2**20  # bytes of an IDX file, unpacked; MNIST's largest has 47 MB
IMAGE = 256 * 2**20  # bytes of a file of an image
PIXELS = 89_478_485  # of an image: 256 MiB of 24 bits, from which on Pillow warns; while it is decoded, up to 1.5 GB
COLUMNS = 50_000  # of a table
UNPACKED = 2**30  # bytes that may be packed into as few as one likes
RATIO = 50  # how often the bytes that are there may become more, where they become more than `UNPACKED`

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def opened(path: str | Path) -> BinaryIO:
    """An ordinary file, open to be read as bytes.

    Raises:
        InputError: it is a folder, a named pipe, a socket or a device; nothing of it was touched.
        OSError: it is not there, or may not be read.
    """
    path = _path(path)
    _check_kind(path, path.stat())
    # it may have been replaced meanwhile: to open a pipe must not wait for who writes to it
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_kind(path, os.fstat(handle))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_regular(path: str | Path, most: int | None = None) -> int:
    """The size of an file that another library is to open; errors as of `opened`, and for more than `most`."""
    path = _path(path)
    found = path.stat()
    _check_kind(path, found)
    if most is not None and found.st_size > most:
        raise _too_large(path, most)
    return found.st_size


def read_bytes(path: str | Path, most: int = TEXT) -> bytes:
    """The bytes of an ordinary file, `most` of them at the most; errors as of `opened`."""
    with opened(path) as file:
        return read_up_to(file, most, path)


def read_text(path: str | Path, most: int = TEXT, errors: str = "strict") -> str:
    """The text of an ordinary file in UTF-8, as `Path.read_text` has it; errors as of `read_bytes`.

    Raises:
        UnicodeDecodeError: it is no text.
    """
    text = read_bytes(path, most).decode("utf-8", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_up_to(file: IO[bytes], most: int, name: str | Path) -> bytes:
    """All that is left of an open file, or of what unpacks it; `InputError` where that is more than `most` bytes."""
    found = file.read(most + 1)
    if len(found) > most:
        raise _too_large(name, most)
    return found


def check_unpacked(name: str, unpacked: int, packed: int) -> None:
    """Raise `InputError` where few bytes say that they become very many; the numbers are those declared."""
    if unpacked > UNPACKED and unpacked > RATIO * packed:
        raise InputError(
            f"{name} would become {unpacked} bytes of the {packed} that are there, more than {RATIO} times as many, as "
            "files do that are made to fill the memory; where you trust it, write it anew without compression"
        )


def _path(path: str | Path) -> Path:
    if "\0" in str(path):
        raise InputError(f"{path} is no path of a file: it has a character of number 0")
    return Path(path).expanduser()


def _check_kind(path: Path, found: os.stat_result) -> None:
    if stat.S_ISREG(found.st_mode):
        return
    kind = next((name for holds, name in KINDS if holds(found.st_mode)), "no file")
    raise InputError(f"{path} is {kind}, expected an ordinary file; give the path of one")


def _too_large(name: str | Path, most: int) -> InputError:
    return InputError(
        f"{name} has more than {most} bytes, the most that is read of such a file; is it the right one?"
    )
