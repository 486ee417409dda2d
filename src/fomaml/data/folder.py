"""Images in a folder, one directory per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch

from fomaml.data.groups import GroupSource
from fomaml.data.images import Decoder, fit_in_memory, images_of, readable_suffixes
from fomaml.data.shares import SHARES, check_shares, dealt
from fomaml.data.source import ClassSource, pixels
from fomaml.errors import InputError, escaped, positive

MODES = {"grey": "L", "rgb": "RGB"}
PARTS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}

NO_CLASSES = "found no directories, expected one per class with its images in it"


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
    in_memory: bool | None = None,
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
        in_memory: decode all images now, and keep them; or each one whenever it is drawn, to the same bits, after a
            look at the headers of all. By default in memory, unless they would take more than 2 GiB, which is logged.

    PNG, JPEG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF, PPM, ICO, TGA and PCX, as far as this Pillow reads them; of an
    animation the first frame. Photographs are turned as their EXIF tag says, what is transparent becomes white. Files
    that are hidden, or of another suffix, are passed over; `origin` counts the latter. Names of classes that are no
    text, or break lines, are escaped. Directories that are there are used as they are; where one class is in more than
    one of them, `origin` says so.

    Raises:
        InputError: no classes, a class without images, an image that cannot be read (the message names
            it) or has more than 8 bits a channel, images of different sizes and no `size`, a part that
            would be empty, shares beside directories that say the split, an option of no meaning, or no Pillow; when an
            image is drawn, a file that has gone or changed since, named too.
    """
    root = Path(path).expanduser()
    size = _checked(size, colour)
    min_images = positive("min_images", min_images, integer=True)
    listing = _Listing(readable_suffixes(), min_images)
    own = _given_parts(root)
    if own is None:
        parts, split = _split_by_class(root, SHARES if shares is None else shares, seed, listing)
    else:
        parts, split = _as_they_are(root, own, shares, listing)
    decoder = Decoder(size, MODES[colour])
    paths = {part: [listing.paths(folder) for folder in folders] for part, folders in parts.items()}
    if in_memory is None:
        in_memory = fit_in_memory(
            [path for own in paths.values() for each in own for path in each], decoder, str(root)
        )
    sources = {part: _source(parts[part], own, decoder, in_memory) for part, own in paths.items()}
    if listing.left_out:
        split += f"; left out {listing.small()}"
    if listing.others:
        split += f"; passed over {_counted(listing.others, 'file')} of other kinds"
    return Folder(
        sources["train"],
        sources.get("validation"),
        sources["test"],
        escaped(f"the folder {root}, {split}"),
        own is not None,
        tuple(listing.left_out),
    )


def has_tasks(path: str | Path) -> bool:
    """Whether a folder has one more level, PATH/TASK/CLASS/IMAGE, and no parts train and test."""
    root = Path(path).expanduser()
    if not root.is_dir() or {folder.name for folder in _directories(root)} & set().union(*PARTS.values()):
        return False
    return any(map(_directories, _directories(root)))


def load_tasks(
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    colour: str = "grey",
    in_memory: bool | None = None,
) -> GroupSource:
    """Read PATH/TASK/CLASS/IMAGE; images, options and errors as of `load_folder`.

    The groups are the tasks, the classes are those of the whole folder, by name.
    """
    root = Path(path).expanduser()
    size = _checked(size, colour)
    listing = _Listing(readable_suffixes())
    paths, labels, tasks = [], [], []
    for task in _directories(root):
        if not (classes := _directories(task)):
            raise InputError(f"{task}: found no directories, expected one per class, as in the other tasks")
        for folder in classes:
            own = listing.paths(folder)
            paths += own
            labels += [escaped(folder.name)] * len(own)
            tasks += [escaped(task.name)] * len(own)
    if not paths:
        raise InputError(f"{root}: found no directories, expected one per task with its classes in it")
    decoder = Decoder(size, MODES[colour])
    if in_memory is None:
        in_memory = fit_in_memory(paths, decoder, str(root))
    source = GroupSource(images_of(paths, decoder, in_memory), labels, tasks, decode=pixels())
    if listing.others:
        source.left_out = _counted(listing.others, "file") + " of other kinds"
    return source


def classes_in(root: Path) -> dict[str, list[Path]]:
    """The images of each directory right below `root`, by its name.

    Raises:
        InputError: no directories; one without images, or with directories of its own.
    """
    folders = _directories(root)
    if not folders:
        raise InputError(f"{root}: {NO_CLASSES}")
    listing = _Listing(readable_suffixes())
    return {escaped(folder.name): listing.paths(folder) for folder in folders}


def few_listed(classes: Sequence[tuple[str, int]]) -> str:
    """The first few of some classes, each with its number of images: "cat 1, dog 3 and 7 more"."""
    return _listed([f"{name} {count}" for name, count in classes])


def _checked(size: tuple[int, int] | None, colour: str) -> tuple[int, int] | None:
    if colour not in MODES:
        raise InputError(f"colour must be 'grey' or 'rgb', got {colour!r}")
    if size is None:
        return None
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise InputError(f"size must be (height, width) or None, got {size!r}")
    height, width = (positive("each side of size", side, integer=True) for side in size)
    return height, width


def _source(folders: list[Path], paths: list[list[Path]], decoder: Decoder, in_memory: bool) -> ClassSource:
    """A part, of its classes' directories and the images of each."""
    labels = torch.arange(len(folders)).repeat_interleave(torch.tensor([len(own) for own in paths]))
    images = images_of([path for own in paths for path in own], decoder, in_memory)
    return ClassSource(images, labels, [escaped(folder.name) for folder in folders], pixels())


def _given_parts(root: Path) -> dict[str, Path] | None:
    """The directories of the parts, by part; None if those in `root` are classes."""
    folders = {folder.name: folder for folder in _directories(root)}
    if not folders:
        raise InputError(f"{root}: {NO_CLASSES}")
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
    root: Path, own: dict[str, Path], shares: object, listing: _Listing
) -> tuple[dict[str, list[Path]], str]:
    """The class directories of parts that the folder itself says."""
    names = ", ".join(folder.name for folder in own.values())
    if shares is not None:
        raise InputError(
            f"{root} is split by its directories {names}, where no shares are of use, got {shares}"
        )
    parts = {part: listing.large_enough(_directories(folder)) for part, folder in own.items()}
    for part, folders in parts.items():
        if not folders:
            few = f" of {listing.min_images} images or more" if listing.left_out else ""
            raise InputError(
                f"{root}: found no class{few} in its directory for {part}, expected one per class"
            )
    split = f"split by its directories {names}"
    classes = [{folder.name for folder in folders} for folders in parts.values()]
    if shared := sorted(set().union(*(a & b for a, b in combinations(classes, 2)))):
        split += f", which share {_counted(len(shared), 'class', 'classes')} ({shared[0]} …)"
    return parts, split


def _split_by_class(
    root: Path, shares: tuple[float, float, float], seed: int, listing: _Listing
) -> tuple[dict[str, list[Path]], str]:
    check_shares(shares)
    folders = listing.large_enough(_directories(root))
    if not folders:
        raise InputError(
            f"{root}: found {listing.small()}, and no larger one: add images, or ask for fewer of a class"
        )
    deal = dealt(folders, shares, seed)
    counts = tuple(map(len, deal))
    shown = "/".join(map(str, counts))
    if not counts[0] or not counts[2] or (shares[1] and not counts[1]):
        few = f" besides {listing.small()}" if listing.left_out else ""
        raise InputError(
            f"{root}: found {_counted(len(folders), 'class', 'classes')}{few}, which the shares {shares} split "
            f"{shown} into train/validation/test; expected some in each: give more classes or other shares"
        )
    parts = {part: folders for part, folders in zip(PARTS, deal) if folders}
    return parts, f"split by class {shown} with seed {seed}"


class _Listing:
    """Lists the images of class directories; counts the files passed over."""

    def __init__(self, suffixes: set[str], min_images: int = 1):
        self.suffixes = suffixes
        self.min_images = min_images
        self.others = 0
        self.left_out: list[tuple[str, int]] = []

    def large_enough(self, folders: list[Path]) -> list[Path]:
        """Those with `min_images` or more; the others are noted as left out. Of 1, `paths` tells."""
        if self.min_images == 1:
            return folders
        counts = {folder: len(self._images(folder)[0]) for folder in folders}
        self.left_out += [(escaped(folder.name), n) for folder, n in counts.items() if n < self.min_images]
        return [folder for folder, n in counts.items() if n >= self.min_images]

    def small(self) -> str:
        """The classes that were left out, in words."""
        number = _counted(len(self.left_out), "class", "classes")
        return f"{number} with fewer than {_counted(self.min_images, 'image')} ({few_listed(self.left_out)})"

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
