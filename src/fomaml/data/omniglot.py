"""Handwritten characters of 50 alphabets: Omniglot (Lake et al. 2015), 1 623 classes of 20 drawings."""

from __future__ import annotations

import hashlib
import io
import math
import os
import random
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from fomaml import regular
from fomaml.data.download import downloading
from fomaml.data.images import opened_image, pillow
from fomaml.data.source import ClassSource, pixels
from fomaml.errors import InputError, positive, whole
from fomaml.files import load_tensors, save_tensors, user_cache

CHARACTERS = {"images_background": 964, "images_evaluation": 659}
DRAWINGS, SIDE = 20, 105  # of a character, and of a drawing in pixels
MAML = (1100, 100)  # characters for training and for validation; the rest are for test
ROTATIONS = ("rot000", "rot090", "rot180", "rot270")
SPLITS = ("maml", "vinyals", "background-evaluation")
FILTERS = ("lanczos", "nearest", "box", "bilinear")
FORMAT = 2  # of the decoded images that are kept: to be raised when what they hold changes


class Omniglot(NamedTuple):
    """Characters in parts that share none, and where they come from.

    train, validation, test: inputs uint8 (examples, 1, size, size), ink 255 on paper 0; drawn ones are
        floating point, ink 1. Classes are named "ALPHABET/characterNN". The split
        "background-evaluation" has no validation: there it is None.
    origin: the place they were read from, and how they were resized, in words.
    split: its name, and the seed where it has one: "maml, seed 1".
    """

    train: ClassSource
    validation: ClassSource | None
    test: ClassSource
    origin: str
    split: str


def load_omniglot(
    root: str | Path | None = None,
    *,
    split: str = "maml",
    resize: str = "lanczos",
    size: int = 28,
    cache: str | Path | None = None,
    allow_download: bool = True,
    seed: int = 1,
) -> Omniglot:
    """Read Omniglot from `root`; without it from the user's cache, else download it to there.

    Arguments:
        root: a folder with images_background.zip and images_evaluation.zip, or with the folders they
            unpack to, or with torchvision's omniglot-py that has them. The archives come first, and are
            read in memory.
        split: "maml": 1100, 100 and 423 characters; "vinyals" (Vinyals et al. 2016): as the text files
            vinyals_train.txt, vinyals_val.txt and vinyals_test.txt beside the data say, 1028, 172 and 423;
            "background-evaluation" (Lake et al. 2015): 964 and 659, whose alphabets differ.
        resize: the filter of Pillow, on 8-bit grey: "lanczos", "bilinear", "box", or "nearest". The last
            is what Pillow silently takes for the 1-bit originals, whichever one asks for; so do the
            original MAML code and many ports, whose text says Lanczos.
        size: the side of the images in pixels.
        cache: the folder of the decoded images; by default beside the data, else the user's cache
            ($XDG_CACHE_HOME or ~/.cache, folder fomaml). They are decoded once per size and filter.
        allow_download: whether the network may be touched where `root` is not given.
        seed: of the split "maml".

    The split "maml" is made as in Finn et al.'s code, which shuffles the character folders with seed 1 and
    cuts; but it shuffled them in the order of `os.listdir`, which no one can repeat. Here the 1623 names
    are sorted by code point and shuffled by `random.Random(seed)`: the sizes are the original's, and the
    characters the same on every machine, but not those behind the published figures.

    Raises:
        InputError: an archive, a folder or a text file is missing, damaged or incomplete (the message
            names it), there is no network, or no Pillow, or an option is unknown.
    """
    for name, value, known in (("split", split, SPLITS), ("resize", resize, FILTERS)):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    size = positive("size", size, integer=True)
    seed = whole("seed", seed, least=-math.inf)
    if root is None:
        root = user_cache()
        missing = [part for part in CHARACTERS if _find(root, part) is None]
        if missing:
            _fetch(root / "omniglot-py", missing, allow_download)
        cure = "delete it, and the next run downloads it again"
    else:
        root = Path(root).expanduser()
        cure = "give a folder that holds both of Omniglot's archives whole, or none to download them"
    paths = []
    for part in CHARACTERS:
        if (path := _find(root, part)) is None:
            raise _wrong(
                root, f"no {part}", f"{part}.zip, the folder {part}, or omniglot-py with either", cure
            )
        paths.append(path)
    images, names = _images(paths, size, resize, cache, cure)
    labels = torch.arange(len(images) // DRAWINGS).repeat_interleave(DRAWINGS)
    source = ClassSource(images, labels, [n for part in names for n in part], pixels(mean=0, std=1))
    numbers = {name: number for number, name in enumerate(source.names)}
    if split == "maml":
        parts = _maml(source.names, seed)
        split = f"maml, seed {seed}"
    elif split == "vinyals":
        parts = _vinyals([paths[0].parent, root], source.names)
    else:
        parts = [names[0], [], names[1]]
    train, validation, test = (
        source.select([numbers[name] for name in part]) if part else None for part in parts
    )
    assert train is not None and test is not None, "every split has both"
    return Omniglot(
        train, validation, test, f"Omniglot in {paths[0].parent}, {size}x{size} by {resize}", split
    )


# --- the parts ------------------------------------------------------------------------------------


def _maml(names: list[str], seed: int) -> list[list[str]]:
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    first, second = MAML[0], sum(MAML)
    return [shuffled[:first], shuffled[first:second], shuffled[second:]]


def _vinyals(folders: list[Path], names: list[str]) -> list[list[str]]:
    """The characters of each text file, whose lines are ALPHABET/characterNN/rotDDD.

    Between them the files must name every character once in each rotation, and no character twice.
    """
    files = [f"vinyals_{part}.txt" for part in ("train", "val", "test")]
    places = {file: next((f / file for f in folders if (f / file).is_file()), None) for file in files}
    if missing := [file for file, path in places.items() if path is None]:
        raise InputError(
            f"{folders[0]}: no {', '.join(missing)}, expected the text files {', '.join(files)} beside the "
            "data for the split vinyals; add them, or take the split maml or background-evaluation"
        )
    cure = "take Vinyals et al.'s text files as they are"
    paths = [path for path in places.values() if path is not None]
    known = set(names)
    found: dict[str, tuple[Path, set[str]]] = {}
    for path in paths:
        for line in _read(path, cure).decode("utf-8", "replace").split():
            name, _, rotation = line.rpartition("/")
            expected = f"ALPHABET/characterNN/rotDDD of one of the {len(names)} characters"
            if name not in known or rotation not in ROTATIONS:
                raise _wrong(path, f"the line {line!r}", expected, cure)
            own, rotations = found.setdefault(name, (path, set()))
            if own != path or rotation in rotations:
                raise _wrong(path, f"{line} once more after {own.name}", "it once", cure)
            rotations.add(rotation)
    whole = [name for name, (_, rotations) in found.items() if len(rotations) == len(ROTATIONS)]
    if absent := sorted(known.difference(whole)):
        text = f"{len(absent)} of {len(names)} characters without all rotations, first {absent[0]}"
        raise _wrong(
            paths[0].with_name("vinyals_*.txt"), text, f"each in all of {', '.join(ROTATIONS)}", cure
        )
    parts = [[name for name, (own, _) in found.items() if own == path] for path in paths]
    for path, part in zip(paths, parts):
        if not part:
            raise _wrong(path, "an empty file", "the characters of a part", cure)
    return parts


# --- the images -----------------------------------------------------------------------------------


def _find(root: Path, part: str) -> Path | None:
    """The archive or the unpacked folder of one half."""
    for folder in (root, root / "omniglot-py"):
        if (folder / f"{part}.zip").is_file():
            return folder / f"{part}.zip"
        if (folder / part).is_dir():
            return folder / part
    return None


def _images(
    paths: list[Path], size: int, resize: str, cache: str | Path | None, cure: str
) -> tuple[Tensor, list[list[str]]]:
    """All drawings (characters * DRAWINGS, 1, size, size) in the order of the character names of each half."""
    contents = [_read_tree(path, cure) if path.is_dir() else _read(path, cure) for path in paths]
    checksum = hashlib.sha256()
    for content in contents:
        checksum.update(_checksum(content))
    file = f"omniglot-{FORMAT}-{size}-{resize}-{checksum.hexdigest()[:16]}.safetensors"
    folders = [paths[0].parent, user_cache()] if cache is None else [Path(cache).expanduser()]
    for folder in folders:
        if (kept := _read_cache(folder / file, size)) is not None:
            return kept
    decoded = [_decode(*each, size, resize, cure) for each in zip(paths, contents)]
    images, names = torch.cat([images for images, _ in decoded]), [names for _, names in decoded]
    alphabets = [{name.partition("/")[0] for name in part} for part in names]
    if shared := set.intersection(*alphabets):
        raise _wrong(paths[1], f"the alphabet {min(shared)}", f"none of those in {paths[0].name}", cure)
    any(_write_cache(folder / file, images, names) for folder in folders)
    return images, names


def _decode(
    path: Path, content: bytes | dict[str, bytes], size: int, resize: str, cure: str
) -> tuple[Tensor, list[str]]:
    """The drawings of one half, (characters * DRAWINGS, 1, size, size), and its sorted character names."""
    Image = pillow()
    part = path.name.removesuffix(".zip")
    members, read = _open(path, content, cure)
    drawings = defaultdict(list)
    for member in members:
        if not member.endswith(".png") or any(p.startswith((".", "__MACOSX")) for p in member.split("/")):
            continue
        match = re.fullmatch(rf"{part}/([^/]+/character\d+)/[^/]+", member)
        if match is None:
            raise _wrong(path, member, f"{part}/ALPHABET/characterNN/NAME.png", cure)
        drawings[match[1]].append(member)
    if len(drawings) != CHARACTERS[part]:
        raise _wrong(path, f"{len(drawings)} characters", f"{CHARACTERS[part]}", cure)
    for name, own in sorted(drawings.items()):
        if len(own) != DRAWINGS:
            raise _wrong(path, f"{len(own)} drawings of {name}", f"{DRAWINGS}", cure)
    images = np.empty((len(drawings) * DRAWINGS, 1, size, size), dtype=np.uint8)
    members = [member for _, own in sorted(drawings.items()) for member in sorted(own)]
    for row, member in enumerate(members):
        try:
            with opened_image(io.BytesIO(read(member)), formats=["PNG"]) as image:
                grey = image.convert("L")  # of a 1-bit image Pillow would take the nearest pixel
        except Exception as error:  # zlib, zipfile and Pillow have many
            why = " ".join(str(error).split()) or type(error).__name__
            raise _wrong(path, f"{member} damaged ({why})", "a PNG image", cure) from None
        if grey.size != (SIDE, SIDE):
            found = "{}x{} pixels in {}".format(*grey.size, member)
            raise _wrong(path, found, f"{SIDE}x{SIDE}", cure)
        images[row, 0] = grey.resize((size, size), Image.Resampling[resize.upper()])
    return torch.from_numpy(255 - images), sorted(drawings)


def _open(
    path: Path, content: bytes | dict[str, bytes], cure: str
) -> tuple[list[str], Callable[[str], bytes]]:
    """The names in an archive or a folder, and how to read one."""
    if isinstance(content, dict):
        return list(content), content.__getitem__
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except Exception as error:  # a cut archive has no directory; zipfile has many words for it
        raise _wrong(path, f"{len(content)} bytes ({error})", "a whole zip archive", cure) from None
    return archive.namelist(), partial(_member, archive)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """One file of an archive, of which no more is unpacked than it declares."""
    if (size := archive.getinfo(name).file_size) > regular.MEMBER:
        raise InputError(f"it would become {size} bytes")
    return archive.read(name)


def _read(path: Path, cure: str) -> bytes:
    try:
        return regular.read_bytes(path, regular.ARCHIVE)
    except OSError as error:
        raise _unreadable(path, error, cure) from None


def _read_tree(folder: Path, cure: str) -> dict[str, bytes]:
    """The PNG files below a folder, by the name they have in the archive."""
    files = {}
    for place, _, names in os.walk(folder):
        inner = Path(place).relative_to(folder.parent).as_posix()
        for name in names:
            if name.endswith(".png"):
                path = os.path.join(place, name)
                try:
                    files[f"{inner}/{name}"] = regular.read_bytes(path, regular.MEMBER)
                except OSError as error:
                    raise _unreadable(path, error, cure) from None
    return files


def _checksum(content: bytes | dict[str, bytes]) -> bytes:
    if isinstance(content, bytes):
        return hashlib.sha256(content).digest()
    checksum = hashlib.sha256()
    for name in sorted(content):
        checksum.update(f"{name} {len(content[name])} ".encode() + content[name])
    return checksum.digest()


# --- the decoded images that are kept -------------------------------------------------------------


def _read_cache(path: Path, size: int) -> tuple[Tensor, list[list[str]]] | None:
    """The images and names of a file of `_write_cache`; None if it is missing or damaged."""
    try:
        tensors, facts = load_tensors(path)
        images, names = tensors["images"], facts["names"]
    except (InputError, KeyError):
        return None
    shape = (sum(CHARACTERS.values()) * DRAWINGS, 1, size, size)
    right = [len(part) for part in names] == list(CHARACTERS.values()) and images.shape == shape
    return (images, names) if right else None


def _write_cache(path: Path, images: Tensor, names: list[list[str]]) -> bool:
    """Write the file; False if the folder takes none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.stat().st_mode & 0o222:  # read-only, though the superuser could write
            return False
        save_tensors(path, {"images": images}, {"names": names})
    except (InputError, OSError, SafetensorError):
        return False
    return True


# --- the download ---------------------------------------------------------------------------------


def _fetch(folder: Path, parts: list[str], allow_download: bool) -> None:
    """Download the archives of `parts`, or say why there is no Omniglot."""
    cure = f"give the folder that holds {' and '.join(f'{part}.zip' for part in CHARACTERS)}"
    if not allow_download:
        raise InputError(f"no Omniglot in {folder}, and downloads are not allowed; {cure}")
    try:
        _download(folder, parts)
    except Exception as error:  # no network, a full disk, no torchvision: all one here
        why = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            cure = f'pip install "fomaml[mnist]", whose torchvision downloads it, or {cure}'
        raise InputError(f"Omniglot was not downloaded ({why}); {cure}") from None


def _download(folder: Path, parts: list[str]) -> None:
    """Have torchvision fetch archives and check their md5; it unpacks nothing. Then move them to `folder`."""
    from torchvision.datasets import Omniglot as known
    from torchvision.datasets.utils import download_url

    prefix = f"{known.download_url_prefix}/"
    with downloading("Omniglot", folder, [prefix], f"{parts[0]}.zip") as place:
        for part in parts:
            download_url(prefix + f"{part}.zip", place, f"{part}.zip", known.zips_md5[part])
            os.replace(place / f"{part}.zip", folder / f"{part}.zip")


def _unreadable(path: str | Path, error: OSError, cure: str) -> InputError:
    return InputError(f"{path}: {error.strerror}, expected a part of Omniglot; {cure}")


def _wrong(path: Path, found: str, expected: str, cure: str) -> InputError:
    return InputError(f"{path}: found {found}, expected {expected}; {cure}")
