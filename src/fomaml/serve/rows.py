"""Rows of tables, of arrays and of recordings that a run has never seen, made ready as its own were."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fomaml.choices import nearest_first
from fomaml.data.arrays import Arrays, together
from fomaml.data.keys import Kind, as_column, key_of, numbered
from fomaml.data.new_rows import known_columns
from fomaml.data.rows import Rows
from fomaml.data.scaling import Scaling, scaled_by
from fomaml.data.table import read_table
from fomaml.data.windows import Windows
from fomaml.errors import InputError
from fomaml.serve.intake import Taken
from fomaml.tasks import first
from fomaml.trees import Tree, joined


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
    decimal: str = "."
    drop_missing: bool = False

    def inputs(self, given: Any) -> Taken:
        return _read_each(given, lambda one: self._read(one, []))

    def labelled(self, given: Any) -> Taken:
        return _read_each(given, lambda one: self._read(one, self.targets))

    def _read(self, given: Any, targets: list[str]) -> Taken:
        frame, origin = read_table(given, self.separator, self.decimal)
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
        inputs = _scaled(together(arrays, self.keys), self.scaling)
        number = len(first(inputs))
        names = [f"row {row}" for row in range(number)]
        if not labelled:
            return Taken(inputs, names)
        labels = _labels(together(arrays, self.targets), self.kind, number)
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
        own = _labels(together(arrays, self.targets), self.kind, cut.number)
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


def _scaled(inputs: Any, scaling: Scaling) -> Tree:
    """All rows of nested arrays, scaled as those of the training tasks."""
    rows = Rows(inputs, "inputs")
    return rows.take(np.arange(len(rows)), scaled_by(scaling.inputs))


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
