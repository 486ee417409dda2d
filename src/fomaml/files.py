"""Where files are kept between runs, and how they are written: whole, or not there; no pickle.

Tensors are written as safetensors files that carry a digest of all that they hold, which is checked when they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fomaml import regular
from fomaml.errors import InputError
from fomaml.sealed import DIGEST, sealed, settings_digest

UNWRITABLE = "backslashreplace"  # of surrogates, which in JSON is their escape
AT_ONCE = 256  # rows of what is read a part at a time
STALE = 3600.0  # seconds after which a temporary file, whose process is gone, was a killed one's


def user_cache() -> Path:
    """$XDG_CACHE_HOME or ~/.cache, folder fomaml."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fomaml"


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically; what is no text, as in names of files, is escaped."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=UNWRITABLE)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place at the end, flushed to disk, unless there was an error.

    A folder that is missing is made.

    Raises:
        InputError: the path is a folder, or its folder cannot be made or written to.
        OSError: the system refuses to write it, as on a full disk; it names the path, and nothing is left behind.
    """
    path = _file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder of {path} cannot be made ({error.strerror}); give another") from None
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"the folder {path.parent} cannot be written to; give another")
    sweep(path.parent, path.name, STALE)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        ordinary = temporary.stat().st_mode  # of new files in this folder; what writes it may set another
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(ordinary)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        refused = _refused(error, path)
        if refused is None:
            raise
        raise refused from error


def _refused(error: BaseException, path: Path) -> OSError | None:
    """What the operating system refused while a file was written, as an error that names the file."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, str(path))
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else None


def sweep(folder: Path, name: str | None = None, older: float = 0.0) -> None:
    """Delete what killed processes have left of `replacing` in a folder.

    name: of the file that was to be replaced; all files by default. older: leave those that are no so many seconds old.
    """
    for path in folder.iterdir():
        of, _, process = path.name.removeprefix(".").rpartition(".")
        if not (path.name.startswith(".") and of and process.isascii() and process.isdecimal()):
            continue
        with suppress(OSError):  # another process may sweep too
            if (
                name in (None, of)
                and time.time() - path.stat().st_mtime >= older
                and not _lives(int(process))
            ):
                path.unlink()


def _lives(process: int) -> bool:
    if process == os.getpid() or os.name == "nt":  # where asking would end it
        return process == os.getpid()
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write `sealed` atomically."""
    write_text(path, sealed(values))


def _file(path: str | Path) -> Path:
    """The path of a file, with ~ as the user's folder."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected a file; add the file's name")
    return path


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write named tensors, and JSON-able facts in the file's header, atomically and flushed to disk.

    settings: what they came from, JSON-able; the file keeps its digest, for `load_tensors` to compare.

    Raises:
        InputError: what is no tensor, or a path that no file can be written to, see `replacing`.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name!r} is a {type(value).__name__}; only tensors can be saved")
    own = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    entry: dict[str, Any] = {"facts": dict(facts or {})}
    if settings is not None:
        entry["settings"] = settings_digest(settings)
    entry[DIGEST] = digest_of(own, entry)
    with replacing(path) as temporary:
        save_file(own, temporary, {"fomaml": json.dumps(entry)})  # one entry: of several the order is chance


def load_tensors(
    path: str | Path,
    device: str | torch.device = "cpu",
    settings: Mapping[str, Any] | None = None,
    checked: bool = False,
) -> tuple[dict[str, Tensor], dict]:
    """Read a file of `save_tensors`: the tensors by name, and the facts.

    checked: refuse a file without a digest, as earlier versions and other libraries write it; and, where there are
        settings, one without a digest of these.

    Raises:
        InputError: the file is not there or damaged, or it was written for other settings.
    """
    path = _file(path)
    try:
        regular.check_regular(path)
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
        entry = json.loads(header.get("fomaml", "{}"))
    except FileNotFoundError:
        raise InputError(f"no file {path}: was the run finished?") from None
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error})") from None
    if header and header.keys() not in ({"fomaml"}, {"format"}):  # of this project, or of others
        raise InputError(f"{path} is damaged: its header has the entries {', '.join(sorted(header))}")
    if not isinstance(entry, dict):
        raise InputError(f"{path} is damaged: its header holds no object")
    if checked and not entry.keys() >= {DIGEST, "facts", *(() if settings is None else ("settings",))}:
        raise InputError(f"{path} is damaged: it has no digest, which it was written with")
    if not entry.keys() & {"facts", "digest"}:
        facts = entry
    elif not {"facts", "digest"} <= entry.keys() <= {"facts", "settings", "digest"}:
        raise InputError(f"{path} is damaged: its header speaks of {', '.join(sorted(entry))}")
    else:
        if entry.pop("digest") != digest_of(tensors, entry):
            raise InputError(f"{path} is damaged: what it holds has another digest than what was written")
        if settings is not None and entry.get("settings") not in (None, settings_digest(settings)):
            raise InputError(
                f"{path} was written for other settings than those given; use the ones of its run"
            )
        facts = entry["facts"]
    return {name: tensor.to(device) for name, tensor in tensors.items()}, facts


def file_digest(path: str | Path) -> str:
    """The SHA-256 digest of a file's bytes."""
    found = hashlib.sha256()
    with regular.opened(_file(path)) as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()


class InParts(Protocol):
    """What is like a tensor, but is read a part at a time."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> torch.Size: ...
    def split(self, size: int, /) -> Iterable[Tensor]: ...


def digest_of(tensors: Mapping[str, Tensor | InParts], entry: Mapping[str, Any]) -> str:
    """The SHA-256 digest of names, dtypes, shapes, bytes and the rest of the header; the memory format is no matter."""
    names = sorted(tensors)
    kinds = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names]
    found = hashlib.sha256(json.dumps([kinds, dict(entry)], sort_keys=True).encode())
    for name in names:
        whole = tensors[name]
        for part in [whole] if isinstance(whole, Tensor) else whole.split(AT_ONCE):
            found.update(part.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
