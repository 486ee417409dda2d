"""Which data a run was made with: a digest of what they hold, never of where they lie."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from fomaml import regular
from fomaml.app.build import Data
from fomaml.app.settings import DIGESTS, Settings
from fomaml.app.sources import path_of, source_of
from fomaml.data.images import readable_suffixes
from fomaml.errors import InputError
from fomaml.files import digest_of, user_cache, write_json
from fomaml.sealed import settings_digest, unsealed

WHOLE = 10**9  # bytes; of a larger file so many blocks are read
BLOCKS, BLOCK = 64, 2**20
CACHE = "digests.json"

log = logging.getLogger(__name__)


def with_identity(settings: Settings, data: Data) -> Settings:
    """The settings with the identity of their data. A run that goes on has it, and is compared.

    Raises:
        InputError: the data are not those that the run began with.
    """
    if settings.format < DIGESTS:  # of an earlier version: unknown
        return settings
    found = identity_of(settings, data)
    if settings.data is not None and settings.data != found:
        raise InputError(
            f"{where(settings)} holds other data than those that the run began with ({differs(settings.data, found)}): "
            "bring them back, or train anew"
        )
    return dataclasses.replace(settings, data=found)


def other_data(settings: Settings, data: Data) -> str | None:
    """That the data are not those that a run was trained with, in words; None where they are, or nobody knows."""
    if settings.data is None:
        return None
    found = identity_of(settings, data)
    if found == settings.data:
        return None
    how = differs(settings.data, found)
    return f"{where(settings)} holds other data than those that the run was trained with ({how})"


def identity_of(settings: Settings, data: Data) -> dict[str, Any]:
    """The identity of the data of a source, JSON-able, with "sha256".

    Of tasks that are made by a formula: its name. Of MNIST and Omniglot: what was read of their archives. Of a file up
    to 1 GB: its bytes; of a larger one its size and 64 blocks of 1 MiB. Of a folder: the relative paths, the sizes and
    the digests of its images and .json files, which are kept by path, size and time in the user's cache.
    """
    path = path_of(settings)
    if path:
        root = Path(path).expanduser()
        return _of_folder(root) if root.is_dir() else _of_file(root)
    if data.own_classes is None:
        formula = {"name": data.name, "formula": data.origin}
        return {**formula, "sha256": settings_digest(formula)}
    drawn: Any = data.test
    parts: Any = {"training": data.own_classes, "test": drawn.source}
    if settings.features_of is not None:  # whose vectors are rounded as the device does
        loaded: Any = source_of(settings).load(settings, False)
        parts = {"training": loaded.train, "test": loaded.test}
    return {"classes": len(parts["training"].names), "sha256": settings_digest(_digests(parts))}


def differs(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What is another, in words: the first that is counted, or the content."""
    for name in ("files", "bytes", "classes"):
        if before.get(name) != now.get(name):
            return f"{now.get(name)} {name}, before {before.get(name)}"
    return "as many, with other content"


def where(settings: Settings) -> str:
    """Where the data lie, as far as the settings tell."""
    return path_of(settings) or str(settings.data_root or f"the source {settings.source}")


def _digests(parts: dict[str, Any]) -> dict[str, str]:
    return {
        part: digest_of(
            {"inputs": source.inputs.cpu(), "counts": source.counts}, {"names": list(source.names)}
        )
        for part, source in parts.items()
    }


def _of_file(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "sha256": _file_digest(path, size)}


def _file_digest(path: Path, size: int) -> str:
    with regular.opened(path) as file:
        if size <= WHOLE:
            found = hashlib.sha256()
            while part := file.read(BLOCK):
                found.update(part)
            return found.hexdigest()
        found = hashlib.sha256(str(size).encode())
        for block in range(BLOCKS):
            file.seek(block * (size - BLOCK) // (BLOCKS - 1))
            found.update(file.read(BLOCK))
        return found.hexdigest()


def _of_folder(root: Path) -> dict[str, Any]:
    kept, known = _Kept(), readable_suffixes() | {".json"}
    found, total = [], 0
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in known or not path.is_file():
                continue
            told = path.stat()
            total += told.st_size
            found.append((path.relative_to(root).as_posix(), told.st_size, kept.digest(path, told)))
    kept.write()
    text = json.dumps(sorted(found))  # escapes what is no text in a name
    return {"files": len(found), "bytes": total, "sha256": hashlib.sha256(text.encode()).hexdigest()}


class _Kept:
    """The digests of files that were read before, by path, size and time."""

    def __init__(self) -> None:
        self.path = user_cache() / CACHE
        self.known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):  # a cache that is not there, or damaged
            self.known = unsealed(regular.read_text(self.path), required=True)
        self.new = False

    def digest(self, path: Path, told: os.stat_result) -> str:
        key, stamp = str(path.resolve()), [told.st_size, told.st_mtime_ns]
        held = self.known.get(key)
        if isinstance(held, list) and held[:2] == stamp:
            return held[2]
        found = _file_digest(path, told.st_size)
        self.known[key] = [*stamp, found]
        self.new = True
        return found

    def write(self) -> None:
        if not self.new:
            return
        try:
            write_json(self.path, self.known)
        except (OSError, InputError) as error:
            log.info("digests of the images are not kept: %s", error)
