"""Images in a folder, one directory per class."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fomaml.data.source import ClassSource, pixels
from fomaml.errors import InputError, plain, positive

MODES = {"grey": "L", "rgb": "RGB"}
PARTS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
WIDE = ("I", "F")  # more than 8 bits a pixel, which Pillow's conversion clips to white


class Folder(NamedTuple):
    """The classes of a folder of images in three parts, and where they come from.

    train, validation, test: inputs uint8 (examples, 1 or 3, height, width); drawn ones are floating
        point in [-1, 1].
    origin: the folder, how it was split (the seed included) and what was left out, in words.
    """

    train: ClassSource
    validation: ClassSource
    test: ClassSource
    origin: str


def load_folder(
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    colour: str = "grey",
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2),
    seed: int = 0,
) -> Folder:
    """Read PATH/CLASS/IMAGE, or PATH/train/CLASS/IMAGE with `val` (`valid`, `validation`) and `test` beside it.

    Arguments:
        size: (height, width) to resize to, with Pillow's Lanczos filter and without regard to the aspect
            ratio. Without it all images must be of one size.
        colour: "grey" (one channel) or "rgb" (three).
        shares, seed: of the classes for training, validation and test, where there are no directories that
            say so; the sorted class names are shuffled by `random.Random(seed)`.

    Every format that Pillow reads; of an animation the first frame. Photographs are turned as their EXIF
    tag says, what is transparent becomes white. Files that are hidden, or whose suffix is not one of
    Pillow's, are passed over; `origin` counts the latter. Directories that are there are used as they are;
    where one class is in more than one of them, `origin` says so.

    Raises:
        InputError: no classes, a class without images, an image that cannot be read (the message names
            it) or has more than 8 bits a channel, images of different sizes and no `size`, a part that
            would be empty, an option of no meaning, or no Pillow.
    """
    root = Path(path).expanduser()
    if colour not in MODES:
        raise InputError(f"colour must be 'grey' or 'rgb', got {colour!r}")
    if size is not None:
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise InputError(f"size must be (height, width) or None, got {size!r}")
        height, width = (positive("each side of size", side, integer=True) for side in size)
        size = height, width
    seed = plain(seed)
    suffixes = readable_suffixes()
    parts = _given_parts(root)
    if parts is None:
        parts, split = _split_by_class(root, shares, seed)
    else:
        split = f"split by its directories {', '.join(folder.name for folder in parts)}"
        parts = [_directories(folder) for folder in parts]
        for folders, part in zip(parts, PARTS):
            if not folders:
                raise InputError(
                    f"{root}: found no class in its directory for {part}, expected one per class"
                )
        classes = [{folder.name for folder in folders} for folders in parts]
        if shared := sorted(set.union(*(a & b for a in classes for b in classes if a is not b))):
            split += f", which share {_counted(len(shared), 'class', 'classes')} ({shared[0]} …)"
    reader = _Reader(size, MODES[colour], suffixes)
    train, validation, test = (reader.source(folders) for folders in parts)
    passed = f"; passed over {_counted(reader.others, 'file')} of other kinds" if reader.others else ""
    return Folder(train, validation, test, f"the folder {root}, {split}{passed}")


def pillow():
    """Pillow's `Image`, imported only where an image is decoded."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise InputError('no Pillow, which reads images; pip install "fomaml[images]"') from None
    return Image


def readable_suffixes() -> set[str]:
    """The suffixes, in lower case, of the formats that this Pillow can open."""
    Image = pillow()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}


def _given_parts(root: Path) -> list[Path] | None:
    """The directories of the three parts; None if those in `root` are classes."""
    folders = {folder.name: folder for folder in _directories(root)}
    if not folders:
        raise InputError(f"{root}: found no directories, expected one per class with its images in it")
    found = [[folders[name] for name in names if name in folders] for names in PARTS.values()]
    known = {folder.name for part in found for folder in part}
    if not all(found) and not (len(known) > 1 and known == folders.keys()):
        return None
    if known != folders.keys() or [len(part) for part in found] != [1, 1, 1]:
        raise InputError(
            f"{root}: found the directories {_listed(sorted(folders))}, expected train, val and test, "
            "or one per class, which are then split by class"
        )
    return [part[0] for part in found]


def _split_by_class(
    root: Path, shares: tuple[float, float, float], seed: int
) -> tuple[list[list[Path]], str]:
    if not isinstance(shares, (tuple, list)) or len(shares) != 3:
        raise InputError(f"shares must be three numbers, for train, validation and test, got {shares!r}")
    if not math.isclose(sum(positive("each of shares", share) for share in shares), 1):
        raise InputError(f"shares must add up to 1, got {shares!r}, which is {sum(shares)}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be a whole number, got {seed!r}")
    folders = _directories(root)
    random.Random(seed).shuffle(folders)
    first, second = round(len(folders) * shares[0]), round(len(folders) * (shares[0] + shares[1]))
    parts = [sorted(part) for part in (folders[:first], folders[first:second], folders[second:])]
    counts = "/".join(str(len(part)) for part in parts)
    if not all(parts):
        raise InputError(
            f"{root}: found {_counted(len(folders), 'class', 'classes')}, which the shares {shares} split "
            f"{counts} into train/validation/test; expected some in each: give more classes or other shares"
        )
    return parts, f"split by class {counts} with seed {seed}"


class _Reader:
    """Reads class directories as images of one size and mode; counts the files passed over."""

    def __init__(self, size: tuple[int, int] | None, mode: str, suffixes: set[str]):
        self.size = size
        self.mode = mode
        self.suffixes = suffixes
        self.others = 0
        self.first: tuple[Path, tuple[int, ...]] | None = None

    def source(self, folders: list[Path]) -> ClassSource:
        images, labels = [], []
        for label, folder in enumerate(folders):
            own = [self._image(path) for path in self._paths(folder)]
            images += own
            labels += [label] * len(own)
        inputs = torch.from_numpy(np.stack(images))  # (examples, h, w) or (examples, h, w, 3)
        inputs = inputs.unsqueeze(1) if inputs.dim() == 3 else inputs.permute(0, 3, 1, 2).contiguous()
        return ClassSource(inputs, torch.tensor(labels), [folder.name for folder in folders], pixels())

    def _paths(self, folder: Path) -> list[Path]:
        """The images of one class, sorted by name."""
        visible = _visible(folder)
        if inner := [path for path in visible if path.is_dir()]:
            raise InputError(
                f"{folder}: found the directory {inner[0].name} in a class, expected images only; "
                "classes must stand right below the given folder, or below its train, val and test"
            )
        paths = [path for path in visible if path.suffix.lower() in self.suffixes]
        if not paths:
            raise InputError(
                f"{folder}: found no image among {_counted(len(visible), 'file')}, expected one or more of a "
                "class; add some, or remove the directory"
            )
        self.others += len(visible) - len(paths)
        return paths

    def _image(self, path: Path) -> np.ndarray:
        """One image, uint8 (h, w) or (h, w, 3)."""
        Image = pillow()
        from PIL import ImageOps

        try:
            with Image.open(path) as file:
                if not file.mode.startswith(WIDE):
                    image = ImageOps.exif_transpose(file)
                    if image.has_transparency_data:
                        image = image.convert("RGBA")
                        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                    image = image.convert(self.mode)
                mode = file.mode
        except Exception as error:  # each of Pillow's plugins has its own
            why = " ".join((getattr(error, "strerror", None) or str(error)).split()) or type(error).__name__
            raise InputError(f"{path} cannot be read as an image ({why}); mend or remove it") from None
        if mode.startswith(WIDE):
            raise InputError(f"{path}: found pixels of mode {mode}, expected 8 bits a channel; convert it")
        if self.size is not None:
            return np.asarray(image.resize(self.size[::-1], Image.Resampling.LANCZOS))
        self.first = self.first or (path, image.size)
        if image.size != self.first[1]:
            (wide, high), (first_wide, first_high) = image.size, self.first[1]
            raise InputError(
                f"{path} is {high} high and {wide} wide, but {self.first[0]} is {first_high} high and "
                f"{first_wide} wide; give the size=(height, width) to resize to"
            )
        return np.asarray(image)


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(folder / name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}, expected a folder of images") from None


def _directories(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
