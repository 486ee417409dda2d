"""Where files are kept between runs, and how they are written: whole, or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def user_cache() -> Path:
    """$XDG_CACHE_HOME or ~/.cache, folder fomaml."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fomaml"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place at the end, flushed to disk, unless there was an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
