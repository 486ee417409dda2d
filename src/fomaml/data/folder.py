"""Images in a folder, one directory per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fomaml.data.groups import GroupSource
from fomaml.data.shares import SHARES, check_shares, dealt
from fomaml.data.source import ClassSource, pixels
from fomaml.errors import InputError, positive

MODES = {"grey": "L", "rgb": "RGB"}
PARTS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
WIDE = ("I", "F")  # more than 8 bits a pixel, which Pillow's conversion clips to white


class Folder(NamedTuple):
    """The classes of a folder of images in three parts, and where they come from.

    train, validation, test: inputs uint8 (examples, 1 or 3, height, width); drawn ones are floating
        point in [-1, 1]. validation is None where there is no such part.
    origin: the folder, how it was split (the seed included) and what was left out, in words.
    given: whether the parts are the folder's own directories.
    left_out: the classes with too few images, each with how many it has.
    """

    train: ClassSource
    validation: ClassSource | None
    test: ClassSource
    origin: str
    given: bool = False
    left_out: Sequence[tuple[str, int]] = ()


def load_folder(
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    colour: str = "grey",
    shares: tuple[float, float, float] | None = None,
    seed: int = 0,
    min_images: int = 1,
) -> Folder:
    """Read PATH/CLASS/IMAGE, or PATH/train/CLASS/IMAGE with `test` and maybe `val` (`valid`, `validation`) beside it.

    Arguments:
        size: (height, width) to resize to, with Pillow's Lanczos filter and without regard to the aspect
            ratio. Without it all images must be of one size.
        colour: "grey" (one channel) or "rgb" (three).
        shares, seed: of the classes for training, validation and test, by default 0.6, 0.2 and 0.2, where there are
            no directories that say so; the sorted class names are shuffled by `random.Random(seed)`. A share of 0
            for validation is none.
        min_images: classes with fewer images are left out before the split, as `left_out` and `origin` say. With 1,
            a class without images is an error.

    Every format that Pillow reads; of an animation the first frame. Photographs are turned as their EXIF
    tag says, what is transparent becomes white. Files that are hidden, or whose suffix is not one of
    Pillow's, are passed over; `origin` counts the latter. Directories that are there are used as they are;
    where one class is in more than one of them, `origin` says so.

    Raises:
        InputError: no classes, a class without images, an image that cannot be read (the message names
            it) or has more than 8 bits a channel, images of different sizes and no `size`, a part that
            would be empty, shares beside directories that say the split, an option of no meaning, or no Pillow.
    """
    root = Path(path).expanduser()
    if colour not in MODES:
        raise InputError(f"colour must be 'grey' or 'rgb', got {colour!r}")
    if size is not None:
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise InputError(f"size must be (height, width) or None, got {size!r}")
        height, width = (positive("each side of size", side, integer=True) for side in size)
        size = height, width
    min_images = positive("min_images", min_images, integer=True)
    reader = _Reader(size, MODES[colour], readable_suffixes(), min_images)
    own = _given_parts(root)
    if own is None:
        parts, split = _split_by_class(root, SHARES if shares is None else shares, seed, reader)
    else:
        parts, split = _as_they_are(root, own, shares, reader)
    sources = {part: reader.source(folders) for part, folders in parts.items()}
    if reader.left_out:
        split += f"; left out {reader.small()}"
    if reader.others:
        split += f"; passed over {_counted(reader.others, 'file')} of other kinds"
    return Folder(
        sources["train"],
        sources.get("validation"),
        sources["test"],
        f"the folder {root}, {split}",
        own is not None,
        tuple(reader.left_out),
    )


def has_tasks(path: str | Path) -> bool:
    """Whether a folder has one more level, PATH/TASK/CLASS/IMAGE, and no parts train and test."""
    root = Path(path).expanduser()
    if not root.is_dir() or {folder.name for folder in _directories(root)} & set().union(*PARTS.values()):
        return False
    return any(map(_directories, _directories(root)))


def load_tasks(path: str | Path, *, size: tuple[int, int] | None = None, colour: str = "grey") -> GroupSource:
    """Read PATH/TASK/CLASS/IMAGE; images, options and errors as of `load_folder`.

    The groups are the tasks, the classes are those of the whole folder, by name.
    """
    root = Path(path).expanduser()
    reader = _Reader(size, MODES[colour], readable_suffixes())
    images, labels, tasks = [], [], []
    for task in _directories(root):
        if not (classes := _directories(task)):
            raise InputError(f"{task}: found no directories, expected one per class, as in the other tasks")
        for folder in classes:
            own = [reader.image(path) for path in reader.paths(folder)]
            images += own
            labels += [folder.name] * len(own)
            tasks += [task.name] * len(own)
    source = GroupSource(_stacked(images), labels, tasks, decode=pixels())
    if reader.others:
        source.left_out = _counted(reader.others, "file") + " of other kinds"
    return source


def few_listed(classes: Sequence[tuple[str, int]]) -> str:
    """The first few of some classes, each with its number of images: "cat 1, dog 3 and 7 more"."""
    return _listed([f"{name} {count}" for name, count in classes])


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


def _given_parts(root: Path) -> dict[str, Path] | None:
    """The directories of the parts, by part; None if those in `root` are classes."""
    folders = {folder.name: folder for folder in _directories(root)}
    if not folders:
        raise InputError(f"{root}: found no directories, expected one per class with its images in it")
    found = {part: [folders[name] for name in names if name in folders] for part, names in PARTS.items()}
    known = {folder.name for each in found.values() for folder in each}
    alone = known == folders.keys() and (len(known) > 1 or any(map(_directories, folders.values())))
    if not all(found.values()) and not alone:
        return None
    counts = [len(each) for each in found.values()]
    if known != folders.keys() or counts not in ([1, 1, 1], [1, 0, 1]):
        raise InputError(
            f"{root}: found the directories {_listed(sorted(folders))}, expected train and test, and val if wanted, "
            "or one per class, which are then split by class"
        )
    return {part: each[0] for part, each in found.items() if each}


def _as_they_are(
    root: Path, own: dict[str, Path], shares: object, reader: _Reader
) -> tuple[dict[str, list[Path]], str]:
    """The class directories of parts that the folder itself says."""
    names = ", ".join(folder.name for folder in own.values())
    if shares is not None:
        raise InputError(
            f"{root} is split by its directories {names}, where no shares are of use, got {shares}"
        )
    parts = {part: reader.large_enough(_directories(folder)) for part, folder in own.items()}
    for part, folders in parts.items():
        if not folders:
            few = f" of {reader.min_images} images or more" if reader.left_out else ""
            raise InputError(
                f"{root}: found no class{few} in its directory for {part}, expected one per class"
            )
    split = f"split by its directories {names}"
    classes = [{folder.name for folder in folders} for folders in parts.values()]
    if shared := sorted(set().union(*(a & b for a, b in combinations(classes, 2)))):
        split += f", which share {_counted(len(shared), 'class', 'classes')} ({shared[0]} …)"
    return parts, split


def _split_by_class(
    root: Path, shares: tuple[float, float, float], seed: int, reader: _Reader
) -> tuple[dict[str, list[Path]], str]:
    check_shares(shares)
    folders = reader.large_enough(_directories(root))
    if not folders:
        raise InputError(
            f"{root}: found {reader.small()}, and no larger one: add images, or ask for fewer of a class"
        )
    deal = dealt(folders, shares, seed)
    counts = tuple(map(len, deal))
    shown = "/".join(map(str, counts))
    if not counts[0] or not counts[2] or (shares[1] and not counts[1]):
        few = f" besides {reader.small()}" if reader.left_out else ""
        raise InputError(
            f"{root}: found {_counted(len(folders), 'class', 'classes')}{few}, which the shares {shares} split "
            f"{shown} into train/validation/test; expected some in each: give more classes or other shares"
        )
    parts = {part: folders for part, folders in zip(PARTS, deal) if folders}
    return parts, f"split by class {shown} with seed {seed}"


class _Reader:
    """Reads class directories as images of one size and mode; counts the files passed over."""

    def __init__(self, size: tuple[int, int] | None, mode: str, suffixes: set[str], min_images: int = 1):
        self.size = size
        self.mode = mode
        self.suffixes = suffixes
        self.min_images = min_images
        self.others = 0
        self.left_out: list[tuple[str, int]] = []
        self.first: tuple[Path, tuple[int, ...]] | None = None

    def large_enough(self, folders: list[Path]) -> list[Path]:
        """Those with `min_images` or more; the others are noted as left out. Of 1, `source` tells."""
        if self.min_images == 1:
            return folders
        counts = {folder: len(self._images(folder)[0]) for folder in folders}
        self.left_out += [(folder.name, n) for folder, n in counts.items() if n < self.min_images]
        return [folder for folder, n in counts.items() if n >= self.min_images]

    def small(self) -> str:
        """The classes that were left out, in words."""
        number = _counted(len(self.left_out), "class", "classes")
        return f"{number} with fewer than {_counted(self.min_images, 'image')} ({few_listed(self.left_out)})"

    def source(self, folders: list[Path]) -> ClassSource:
        images, labels = [], []
        for label, folder in enumerate(folders):
            own = [self.image(path) for path in self.paths(folder)]
            images += own
            labels += [label] * len(own)
        return ClassSource(
            _stacked(images), torch.tensor(labels), [folder.name for folder in folders], pixels()
        )

    def _images(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The images of one class, sorted by name, and all files in sight."""
        visible = _visible(folder)
        if inner := [path for path in visible if path.is_dir()]:
            raise InputError(
                f"{folder}: found the directory {inner[0].name} in a class, expected images only; "
                "classes must stand right below the given folder, or below its train, val and test"
            )
        return [path for path in visible if path.suffix.lower() in self.suffixes], visible

    def paths(self, folder: Path) -> list[Path]:
        """The images of one class, one or more; what is passed over is counted."""
        paths, visible = self._images(folder)
        if not paths:
            raise InputError(
                f"{folder}: found no image among {_counted(len(visible), 'file')}, expected one or more of a "
                "class; add some, or remove the directory"
            )
        self.others += len(visible) - len(paths)
        return paths

    def image(self, path: Path) -> np.ndarray:
        """One image, uint8 (h, w) or (h, w, 3)."""
        array = image_array(path, self.mode, str(path))
        Image = pillow()
        if self.size is not None:
            return np.asarray(Image.fromarray(array).resize(self.size[::-1], Image.Resampling.LANCZOS))
        self.first = self.first or (path, array.shape[:2])
        if array.shape[:2] != self.first[1]:
            (high, wide), (first_high, first_wide) = array.shape[:2], self.first[1]
            raise InputError(
                f"{path} is {high} high and {wide} wide, but {self.first[0]} is {first_high} high and "
                f"{first_wide} wide; give the size=(height, width) to resize to"
            )
        return array


def image_array(file: Any, mode: str, name: str) -> np.ndarray:
    """An image file as uint8 (height, width) or (height, width, 3).

    mode: of Pillow, "L" or "RGB". name: of the file, for messages. Turned as its EXIF tag says; what is transparent
    becomes white.

    Raises:
        InputError: it cannot be read, or has more than 8 bits a channel.
    """
    Image = pillow()
    from PIL import ImageOps

    try:
        with Image.open(file) as opened:
            if not opened.mode.startswith(WIDE):
                image = ImageOps.exif_transpose(opened)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                image = image.convert(mode)
            own = opened.mode
    except Exception as error:  # each of Pillow's plugins has its own
        why = " ".join((getattr(error, "strerror", None) or str(error)).split()) or type(error).__name__
        raise InputError(f"{name} cannot be read as an image ({why}); mend or remove it") from None
    if own.startswith(WIDE):
        raise InputError(f"{name}: found pixels of mode {own}, expected 8 bits a channel; convert it")
    return np.asarray(image)


def _stacked(images: list[np.ndarray]) -> torch.Tensor:
    """(examples, channels, h, w), of images (h, w) or (h, w, 3)."""
    inputs = torch.from_numpy(np.stack(images))
    return inputs.unsqueeze(1) if inputs.dim() == 3 else inputs.permute(0, 3, 1, 2).contiguous()


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
