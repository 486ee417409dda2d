"""Raw inputs made ready as in training: pictures, rows of a table, arrays and recordings that the run has never seen.

What a run did to its data is kept as plain values: sizes, colours, columns, categories, scaling. An intake is these
values and the way from a stranger's file to what the model takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fomaml.backbones import Decoder as Colours
from fomaml.choices import nearest_first
from fomaml.data.arrays import Arrays
from fomaml.data.images import Decoder, pillow, readable_suffixes
from fomaml.data.keys import Kind, as_column, key_of, numbered
from fomaml.data.new_rows import known_columns
from fomaml.data.rows import Rows
from fomaml.data.scaling import Scaling
from fomaml.data.source import pixels
from fomaml.data.table import read_table
from fomaml.data.windows import Windows
from fomaml.errors import InputError
from fomaml.tasks import first
from fomaml.trees import Tree, joined

Filter = Literal["lanczos", "nearest", "box", "bilinear"]


class Taken(NamedTuple):
    """Examples as the model takes them.

    inputs: (examples, ...), nested as in training. names: what each is called: a file's path, or the number of a row.
    labels: of each its class as text, or floating (examples, targets) in the targets' own unit; None where there are
        none. tasks: the different tasks of labelled rows, where they say so.
    """

    inputs: Tree
    names: list[str]
    labels: list[str] | Tensor | None = None
    tasks: list[str] | None = None


class Intake(Protocol):
    """inputs: without labels; labelled: with. Both raise `InputError` for what the run does not take."""

    def inputs(self, given: Any) -> Taken: ...

    def labelled(self, given: Any) -> Taken: ...


# --- pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Images of one size: read, turned, coloured, resized and scaled as those of the run.

    mean, std: of the scaling, (x / 255 - mean) / std; of each colour for a network that takes three, as which grey ones
    reach it too. inverted: dark ink on light paper becomes 255 on 0, as of
    Omniglot. filter: of Pillow, to resize with.

    Inputs are a path or several, of files and of folders, which are searched; images of Pillow; arrays (height,
    width), (height, width, 3) or several of them; or tensors (examples, channels, height, width) that the model takes,
    of uint8 before the scaling. Labelled ones are a folder with a directory for each class, a dict from class to such
    inputs, or a pair (inputs, labels).
    """

    channels: int
    height: int
    width: int
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    inverted: bool = False
    filter: Filter = "lanczos"

    def inputs(self, given: Any) -> Taken:
        if isinstance(given, Tensor):
            return Taken(self.ready(given), [str(number) for number in range(len(given))])
        decoder = Decoder((self.height, self.width), "L" if self.channels == 1 else "RGB", self.filter)
        names, images = [], []
        for number, own in enumerate(self._several(given)):
            names.append(str(own) if isinstance(own, Path) else f"picture {number}")
            file = None if isinstance(own, Path) else _as_file(own, names[-1])
            images.append(decoder.image(Path(names[-1]), file))
        if not images:
            raise InputError("no pictures given")
        return Taken(self.ready(torch.from_numpy(np.stack(images))), names)

    def labelled(self, given: Any) -> Taken:
        if isinstance(given, str | os.PathLike):
            given = self._classes(Path(given).expanduser())
        if isinstance(given, Mapping):
            parts = {key_of(name): self.inputs(own) for name, own in given.items()}
            if not parts:
                raise InputError("no classes given")
            return Taken(
                torch.cat([part.inputs for part in parts.values()]),
                [name for part in parts.values() for name in part.names],
                [label for label, part in parts.items() for _ in part.names],
            )
        inputs, labels = _pair(given)
        taken = self.inputs(inputs)
        return taken._replace(labels=_texts(labels, len(taken.names)))

    def ready(self, images: Tensor) -> Tensor:
        """Pictures (examples, channels, height, width) of uint8 scaled as the model takes them; floating ones are."""
        seen = len(self.mean) if isinstance(self.mean, tuple) else self.channels
        shape = seen if images.is_floating_point() else self.channels, self.height, self.width
        if images.dim() != 4 or tuple(images.shape[1:]) != shape:
            raise InputError(
                f"a tensor of pictures is (examples, {', '.join(map(str, shape))}) here, got {tuple(images.shape)}"
            )
        if images.is_floating_point():
            return images
        images = 255 - images if self.inverted else images
        if isinstance(self.mean, tuple) or isinstance(self.std, tuple):
            assert isinstance(self.mean, tuple) and isinstance(self.std, tuple)
            return Colours(self.mean, self.std)(images)
        return pixels(self.mean, self.std)(images)

    def _several(self, given: Any) -> Iterator[Any]:
        """One picture after the other: a path, an image of Pillow or an array."""
        if isinstance(given, str | os.PathLike):
            path = Path(given).expanduser()
            if path.is_dir():
                found = sorted(each for each in path.rglob("*") if each.suffix.lower() in readable_suffixes())
                if not (found := [each for each in found if not each.name.startswith(".")]):
                    raise InputError(f"{path} holds no picture")
                yield from found
            elif not path.exists():
                raise InputError(f"no file {path}")
            else:
                yield path
        elif isinstance(given, np.ndarray):
            one = given.ndim == 2 or (given.ndim == 3 and given.shape[2] in (1, 3, 4))
            if not one and given.ndim not in (3, 4):
                raise InputError(
                    f"a picture is an array (height, width) or (height, width, 3), got {given.shape}"
                )
            yield from [given] if one else given
        elif isinstance(given, pillow().Image):
            yield given
        elif isinstance(given, Iterable):
            for own in given:
                yield from self._several(own)
        else:
            raise InputError(f"a picture is a path, an image or an array, got a {type(given).__name__}")

    def _classes(self, root: Path) -> dict[str, list[Path]]:
        """The pictures of each directory of a folder."""
        if not root.is_dir():
            raise InputError(f"{root} is no folder, expected one with a directory of pictures for each class")
        folders = sorted(each for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
        if not folders:
            raise InputError(
                f"{root}: found no directories, expected one for each class with its pictures in it"
            )
        for folder in folders:
            if inner := sorted(each.name for each in folder.iterdir() if each.is_dir()):
                raise InputError(
                    f"{folder}: found the directory {inner[0]} in a class, expected pictures only; the classes must "
                    "stand right below the given folder"
                )
        return {folder.name: list(self._several(folder)) for folder in folders}


def _as_file(given: Any, name: str) -> BytesIO:
    """An image of Pillow, or an array of whole numbers up to 255, as a file of the same pixels."""
    if isinstance(given, np.ndarray):
        given = given.astype(np.uint8) * 255 if given.dtype == bool else given
        if given.dtype != np.uint8:
            raise InputError(f"{name} is an array of {given.dtype}, expected uint8, 0 to 255")
        given = pillow().fromarray(given[..., 0] if given.ndim == 3 and given.shape[2] == 1 else given)
    file = BytesIO()
    given.save(file, "PNG")
    file.seek(0)
    return file


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableRows:
    """Rows of a csv, tsv or parquet file, or of a DataFrame.

    features: the columns that are numbers, in order. categories: those that are not, each with its texts in the order
    of their numbers. targets: the columns to predict. task: the column that says which task a labelled row is of, if it
    is there. Columns beside all these are passed over. Labelled ones are a table that has the targets too.
    """

    features: list[str]
    targets: list[str]
    kind: Kind
    task: str | None = None
    categories: dict[str, list[str]] = field(default_factory=dict)
    scaling: Scaling = field(default_factory=Scaling)
    separator: str | None = None
    drop_missing: bool = False

    def inputs(self, given: Any) -> Taken:
        return _read_each(given, lambda one: self._read(one, []))

    def labelled(self, given: Any) -> Taken:
        return _read_each(given, lambda one: self._read(one, self.targets))

    def _read(self, given: Any, targets: list[str]) -> Taken:
        frame, origin = read_table(given, self.separator)
        found = known_columns(
            frame, origin, self.features, self.categories, targets, self.kind, self.drop_missing
        )
        inputs = _scaled(found.inputs, self.scaling)
        names = [f"row {number + 1}" for number in found.rows]
        if not targets:
            return Taken(inputs, names)
        keys = frame[self.task].iloc[found.rows] if self.task in frame.columns else None
        return Taken(inputs, names, _labels(found.targets, self.kind), _tasks(keys))


@dataclass(frozen=True)
class ArrayRows:
    """Rows of the arrays of an .npz file, a folder of .npy files, or a dict.

    keys: of the inputs; several reach the model as keywords. targets, task: the keys of the targets, and of the tasks
    of labelled rows, if it is there.
    """

    keys: list[str]
    targets: list[str]
    kind: Kind
    task: str | None = None
    scaling: Scaling = field(default_factory=Scaling)

    def inputs(self, given: Any) -> Taken:
        return _read_each(given, lambda one: self._read(one, False))

    def labelled(self, given: Any) -> Taken:
        return _read_each(given, lambda one: self._read(one, True))

    def _read(self, given: Any, labelled: bool) -> Taken:
        arrays = _arrays(given)
        inputs = _scaled(_of_keys(arrays, self.keys), self.scaling)
        number = len(first(inputs))
        names = [f"row {row}" for row in range(number)]
        if not labelled:
            return Taken(inputs, names)
        labels = _labels(_of_keys(arrays, self.targets), self.kind, number)
        return Taken(inputs, names, labels, _tasks(_if_there(arrays, self.task)))


@dataclass(frozen=True)
class WindowRows:
    """Windows of recordings, which stand one after the other in an array beside their lengths.

    key, lengths, targets: the keys of the samples, of the lengths and of the targets, one for each recording. task:
    that of the tasks of labelled ones, if it is there.
    """

    key: str
    lengths: str
    window: int
    hop: int
    targets: list[str]
    kind: Kind
    task: str | None = None
    scaling: Scaling = field(default_factory=Scaling)
    skip_short: bool = False

    def inputs(self, given: Any) -> Taken:
        return _read_each(given, lambda one: self._read(one, False))

    def labelled(self, given: Any) -> Taken:
        return _read_each(given, lambda one: self._read(one, True))

    def _read(self, given: Any, labelled: bool) -> Taken:
        arrays = _arrays(given)
        cut = Windows.cut(arrays[self.key], arrays[self.lengths], self.window, self.hop, self.skip_short)
        first = np.searchsorted(cut.recordings, cut.recordings)
        names = [
            f"recording {recording}, window {row - begin}"
            for row, (recording, begin) in enumerate(zip(cut.recordings.tolist(), first.tolist()))
        ]
        inputs = _scaled(cut, self.scaling)
        if not labelled:
            return Taken(inputs, names)
        own = _labels(_of_keys(arrays, self.targets), self.kind, cut.number)
        labels: Any = [own[n] for n in cut.recordings] if isinstance(own, list) else own[cut.recordings]
        return Taken(inputs, names, labels, _tasks(_if_there(arrays, self.task)))


def _read_each(given: Any, read: Callable[[Any], Taken]) -> Taken:
    """What is read of one file, or of several in a list: the names then say of which."""
    if not isinstance(given, list):
        return read(given)
    if not given:
        raise InputError("no inputs given")
    if len(given) == 1:
        return read(given[0])
    parts = [read(one) for one in given]
    names = [
        f"{one if isinstance(one, str | os.PathLike) else number}: {name}"
        for number, (one, part) in enumerate(zip(given, parts))
        for name in part.names
    ]
    labels: Any = [part.labels for part in parts]
    if isinstance(labels[0], list):
        labels = [label for part in labels for label in part]
    elif labels[0] is not None:
        labels = torch.cat(labels)
    else:
        labels = None
    tasks = sorted({task for part in parts for task in part.tasks or ()})
    return Taken(joined([part.inputs for part in parts]), names, labels, tasks or None)


def _if_there(arrays: Mapping[str, Any], key: str | None) -> Any:
    return arrays[key] if key is not None and key in list(arrays) else None


def _tasks(keys: Any) -> list[str] | None:
    return None if keys is None else numbered(keys, "tasks")[0]


def _arrays(given: Any) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return _Named(given)
    if not isinstance(given, str | os.PathLike):
        raise InputError(
            f"arrays are an .npz file, a folder of .npy files or a dict, got a {type(given).__name__}"
        )
    return Arrays(Path(given))


class _Named(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        raise InputError(f"there is no array {key!r}; there are: {nearest_first(key, list(self))}")


def _of_keys(arrays: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return arrays[keys[0]] if len(keys) == 1 else {key: arrays[key] for key in keys}


def _scaled(inputs: Any, scaling: Scaling) -> Tree:
    """All rows of nested arrays, scaled as those of the training tasks."""
    rows = Rows(inputs, "inputs")
    known = scaling.inputs

    def change(drawn: Tensor, place: str) -> Tensor:
        return known[place].scaled(drawn) if place in known else drawn

    return rows.take(np.arange(len(rows)), change)


def _labels(given: Any, kind: Kind, number: int | None = None) -> list[str] | Tensor:
    """Classes as text, or targets in their own unit, floating (examples, targets)."""
    if kind == "classification":
        found: Any = [key_of(value) for value in as_column(given, "targets")]
    else:
        rows = Rows(given, "targets")
        if not rows.alone:
            raise InputError("several targets are the columns of one array, got a nesting")
        found = rows.take(
            np.arange(len(rows)), dtype=torch.float64
        )  # scaled before it is rounded, as in training
        found = found[:, None] if found.dim() == 1 else found
    if number is not None and len(found) != number:
        raise InputError(f"{number} inputs, but {len(found)} targets")
    return found


def _pair(given: Any) -> tuple[Any, Any]:
    if not isinstance(given, tuple) or len(given) != 2:
        raise InputError(
            f"labelled examples are a folder, a dict from class to pictures or a pair (inputs, labels), got a "
            f"{type(given).__name__}"
        )
    return given


def _texts(labels: Any, number: int) -> list[str]:
    found = [key_of(value) for value in as_column(labels, "labels")]
    if len(found) != number:
        raise InputError(f"{number} inputs, but {len(found)} labels")
    return found
