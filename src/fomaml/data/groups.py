"""Rows with a task key: tables with a task column, recordings of many subjects, clients of unequal size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fomaml.choices import check_choice, nearest_first
from fomaml.data.keys import Kind, classes_of, few, key_of, kind_of, numbered, ranks
from fomaml.data.rows import AT_ONCE, Rows, each, in_memory
from fomaml.data.scaling import Scaling, Standard, fitted, scaled_by
from fomaml.data.shares import parted
from fomaml.data.table import read_columns
from fomaml.data.windows import Windows
from fomaml.errors import InputError
from fomaml.trees import mapped

Draw = Literal["random", "first", "anytime"]


class GroupSource:
    """Rows of inputs and targets in groups, each of which is a task; rows are read only when they are drawn.

    Arguments:
        inputs: (rows, ...), an array, a tensor or a memory-mapped array (`np.load(…, mmap_mode="r")`), or dicts and
            tuples of these, see `fomaml.data.rows.Rows`.
        targets: (rows,) labels, whole numbers or text; or floating (rows,) or (rows, targets, ...), or a nesting.
        groups: (rows,) the key of each row's task, text or numbers.
        order: (rows,) numbers or dates that the rows of a group are sorted by; by default they stay as they are. Equal
            ones stay as they are too.
        kind: "classification", whose classes are the same in all tasks, or "regression"; by default regression where
            targets are floating or nested.
        classes: the classes, in the order of their numbers; by default all that there are, sorted.
        input_names, target_names: of the columns, to be kept beside them.
        decode: maps the inputs drawn, nested tensors (rows, ...), to what the model takes.
        draw, gap: what `GroupEpisodes` does where it is not told otherwise.

    Attributes:
        names: the keys of the groups as text, sorted as they were before.
        counts: (groups,) their numbers of rows. class_counts: (groups, classes) the same by class, or None.
        rows: (rows,) the row of the arrays that stands at each position: groups one after the other, sorted by `order`.
        offsets: (groups,) the position where each group begins.
        classes: the names of the classes, or None. outputs: what a model has to give: one for each class, or for each
            target; None for nested targets.
        input_shapes: the shape of the inputs of one row, nested as they are.
        dropped: how many rows were left out for missing values. left_out: what else was, in words.

    Raises:
        InputError: arrays of different lengths, object arrays, numbers that are not finite, missing keys; one class
            only, targets that are all the same.
    """

    def __init__(
        self,
        inputs: Any,
        targets: Any,
        groups: Any,
        order: Any = None,
        *,
        kind: Kind | None = None,
        classes: Sequence[Any] | None = None,
        input_names: Sequence[str] | None = None,
        target_names: Sequence[str] | None = None,
        decode: Callable[[Any], Any] | None = None,
        draw: Draw = "random",
        gap: int = 0,
    ):
        self._inputs = Rows(inputs, "inputs")
        kind = kind or kind_of(targets)
        check_choice("kind", kind, Kind)
        self.kind: Kind = kind
        self.classes: list[str] | None = None
        if kind == "classification":
            targets, self.classes = classes_of(targets, classes)
        elif classes is not None:
            raise InputError("regression has no classes, got some; give kind='classification'")
        self._targets = Rows(targets, "targets")
        keys, codes = numbered(groups, "groups")
        self._check_lengths(groups=len(codes), order=None if order is None else len(order))
        if kind == "regression":
            _check_targets(self._targets)
        self.names = keys
        ordered = np.arange(len(codes)) if order is None else ranks(order)
        self.rows = np.lexsort((ordered, codes))  # stable: rows of equal order stay as they are
        self.counts = np.bincount(codes, minlength=len(keys))
        self.input_names = None if input_names is None else [str(name) for name in input_names]
        self.target_names = None if target_names is None else [str(name) for name in target_names]
        self.categories: dict[str, list[str]] = {}
        self.decode = decode
        self.draw: Draw = draw
        self.gap = gap
        self.least_gap = 0  # so many rows between two share nothing, as windows would that overlap
        self.scaling = Scaling()
        self.dropped = 0
        self.left_out = ""

    @classmethod
    def from_table(
        cls,
        table: Any,
        *,
        task: str,
        target: str | Sequence[str],
        order: str | None = None,
        features: Sequence[str] | None = None,
        kind: Kind | None = None,
        categorical: Sequence[str] = (),
        drop_missing: bool = False,
        separator: str | None = None,
        decimal: str = ".",
    ) -> GroupSource:
        """The rows of a table: a csv, tsv or parquet file, or a DataFrame of pandas or polars.

        task, target, order, features: columns. Several targets are for regression. By default all other columns are
            features, and the order too where it holds numbers.
        kind: by default classification where the one target is text, true or false, or has at most 20 different values,
            all whole numbers; else regression.
        categorical: features that are no numbers. With some, inputs are {"numbers": floating (rows, features),
            "categories": int64 (rows, features)}, and `categories` has the texts that the numbers stand for, by column.
        drop_missing: leave out rows that lack a value in a column that is used, and count them as `dropped`.
        separator: what stands between the columns of a file, by default a comma, or a tab in .tsv.
        decimal: the decimal point of its numbers, "." or ",".

        Raises:
            InputError: no such file or column, the same column twice, missing or infinite values, text where numbers
                are expected, and as `GroupSource`. The message says where.
        """
        found = read_columns(
            table, task, target, order, features, kind, categorical, drop_missing, separator, decimal
        )
        source = cls(
            found.inputs,
            found.targets,
            found.groups,
            found.order,
            kind=found.kind,
            input_names=found.features,
            target_names=found.target_names,
        )
        source.categories, source.dropped = found.categories, found.dropped
        return source

    @classmethod
    def from_windows(
        cls,
        samples: Any,
        lengths: Any,
        groups: Any,
        targets: Any,
        *,
        window: int,
        hop: int,
        kind: Kind | None = None,
        classes: Sequence[Any] | None = None,
        leave_out_short: bool = False,
        input_names: Sequence[str] | None = None,
        target_names: Sequence[str] | None = None,
        decode: Callable[[Any], Any] | None = None,
    ) -> GroupSource:
        """Windows of long recordings, read from the samples as they are drawn: inputs (rows, channels, window).

        samples: (samples, channels), or (samples,), of all recordings one after the other; may be memory-mapped. Whole
            numbers, as of 16 bits, are drawn as floating ones.
        lengths, groups, targets: (recordings, …) the number of samples, the key of the task and the target of each.
        window, hop: the samples of a window, and from one window to the next.
        leave_out_short: leave out recordings that are shorter than a window, which `left_out` tells; else they are
            refused.

        Windows stand in the order of their recordings, then of time. Episodes draw the first by default, with the gap
        that leaves no sample both in support and query.

        Raises:
            InputError: lengths that do not add up to the samples, recordings that are too short, and as `GroupSource`.
        """
        cut = Windows.cut(samples, lengths, window, hop, leave_out_short)
        recordings = cut.recordings

        def spread(given: Any, place: str) -> np.ndarray:
            array = np.asarray(given)
            if array.shape[:1] != (cut.number,):
                raise InputError(
                    f"{cut.number} recordings, but {place} of shape {array.shape}; a recording has one value each"
                )
            return array[recordings]

        source = cls(
            cut,
            each(targets, spread, "targets"),
            spread(groups, "groups"),
            kind=kind,
            classes=classes,
            input_names=input_names,
            target_names=target_names,
            decode=decode,
            draw="first",
            gap=cut.gap,
        )
        source.least_gap, source.left_out = cut.gap, cut.left_out
        return source

    def __len__(self) -> int:
        """The number of groups."""
        return len(self.names)

    @property
    def offsets(self) -> np.ndarray:
        return self.counts.cumsum() - self.counts

    @property
    def outputs(self) -> int | None:
        if self.classes is not None:
            return len(self.classes)
        if not self._targets.alone:
            return None
        return int(np.prod(self._targets.shapes() or (1,)))

    @property
    def device(self) -> torch.device | None:
        """Where the inputs are, if some are tensors."""
        return next((array.device for _, array in self._inputs.found if isinstance(array, Tensor)), None)

    @property
    def input_shapes(self) -> Any:
        return self._inputs.shapes()

    @property
    def class_counts(self) -> np.ndarray | None:
        if self.classes is None:
            return None
        labels = self._targets.tree[self.rows]
        table = np.zeros((len(self), len(self.classes)), dtype=np.int64)
        np.add.at(table, (np.repeat(np.arange(len(self)), self.counts), labels), 1)
        return table

    def positions(self, group: int) -> list[np.ndarray]:
        """The positions of a group's rows, in order: of regression all together, of classification by class."""
        start = int(self.offsets[group])
        own = np.arange(start, start + int(self.counts[group]))
        if self.classes is None:
            return [own]
        labels = self._targets.tree[self.rows[own]]
        return [own[labels == number] for number in range(len(self.classes))]

    def take(self, positions: np.ndarray) -> tuple[Any, Any]:
        """The inputs and targets of the rows at these positions, scaled and decoded, nested tensors (rows, ...).

        Targets are int64 for classification; for regression those of one number a row are (rows, 1).
        """
        rows = self.rows[positions]
        inputs = self._inputs.take(rows, scaled_by(self.scaling.inputs))
        if self.decode is not None:
            inputs = self.decode(inputs)
        if self.classes is not None:
            return inputs, self._targets.take(rows)
        targets = self._targets.take(rows, scaled_by(self.scaling.targets))
        return inputs, mapped(_with_columns, targets)

    # --- which tasks ------------------------------------------------------------------------------

    def select(self, keys: Iterable[Any]) -> GroupSource:
        """Only the groups of these keys, in the order given; arrays are shared.

        Raises:
            InputError: none, one twice, or a key that is not there; the message lists those that are.
        """
        names = [key_of(key) for key in ([keys] if isinstance(keys, str) else keys)]
        if not names:
            raise InputError(f"no tasks selected; there are: {few(self.names)}")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"the task {twice!r} is selected twice")
        numbers = {name: number for number, name in enumerate(self.names)}
        for name in names:
            if name not in numbers:
                raise InputError(f"no task {name!r} here; there are: {nearest_first(name, self.names)}")
        own = [numbers[name] for name in names]
        chosen = copy(self)
        chosen.names = names
        offsets = self.offsets
        chosen.rows = np.concatenate([self.rows[offsets[n] : offsets[n] + self.counts[n]] for n in own])
        chosen.counts = self.counts[own]
        return chosen

    def split(
        self,
        shares: tuple[float, float, float] | None = None,
        *,
        seed: int = 0,
        train: Iterable[Any] | None = None,
        validation: Iterable[Any] | None = None,
        test: Iterable[Any] | None = None,
    ) -> GroupSplit:
        """The tasks dealt out to training, validation and test, by shares (0.6, 0.2, 0.2) or by lists of their keys.

        seed: `random.Random(seed)` shuffles the names. A share of 0 for validation is none.
        train, validation, test: keys; those in no list go to training if it has none of its own, else to no part.

        Raises:
            InputError: a key that is not there, or in two lists; a part that would be empty; shares beside lists.
        """
        lists = {"train": train, "validation": validation, "test": test}
        record = parted(self.names, shares, seed, lists)
        return GroupSplit(
            self.select(record["train"]),
            self.select(record["validation"]) if record["validation"] else None,
            self.select(record["test"]),
            record,
        )

    # --- scaling ----------------------------------------------------------------------------------

    def fit_scaling(self, inputs: bool = True, targets: bool = True) -> Scaling:
        """The means and deviations of these rows, of inputs and of regression's targets; whole numbers have none.

        All rows are read, a part at a time. Fit it on the training tasks alone, then `scaled` applies it to others.

        Raises:
            InputError: a target that has the same value in all these rows.
        """
        parts = [np.sort(self.rows)[start : start + AT_ONCE] for start in range(0, len(self.rows), AT_ONCE)]
        of_inputs = fitted(self._inputs.take(part, dtype=torch.float64) for part in parts) if inputs else {}
        of_targets = {}
        if targets and self.kind == "regression":
            of_targets = fitted(self._targets.take(part, dtype=torch.float64) for part in parts)
            _check_deviations(of_targets, self.target_names)
        return Scaling(of_inputs, of_targets)

    def scaled(self, scaling: Scaling | None) -> GroupSource:
        """The same rows, scaled when they are drawn, instead of as before; None for as they are."""
        own = copy(self)
        own.scaling = Scaling() if scaling is None else scaling
        return own

    def with_inputs(self, inputs: Tensor) -> GroupSource:
        """The same rows with other inputs: (rows, ...), in the order of `rows`, neither to be scaled nor decoded."""
        own = copy(self)
        placed = inputs.new_zeros(len(self._inputs), *inputs.shape[1:])
        placed[torch.from_numpy(self.rows)] = inputs
        own._inputs, own.decode, own.input_names, own.categories = Rows(placed, "inputs"), None, None, {}
        own.scaling = Scaling(targets=self.scaling.targets)
        return own

    def _check_lengths(self, **others: int | None) -> None:
        lengths = {"inputs": len(self._inputs), "targets": len(self._targets), **others}
        known = {name: length for name, length in lengths.items() if length is not None}
        if len(set(known.values())) > 1:
            told = ", ".join(f"{name} {length}" for name, length in known.items())
            raise InputError(f"arrays of different lengths: {told}; each has one value for each row")


class GroupSplit(NamedTuple):
    """Tasks of one source in three parts. validation is None where there is none.

    record: JSON-able, the keys of each part, and the shares and seed where these have made it.
    """

    train: GroupSource
    validation: GroupSource | None
    test: GroupSource
    record: dict[str, Any]

    def scaled(self, scaling: Scaling | None = None) -> GroupSplit:
        """All parts scaled; by default as fitted on the training tasks, which `train.scaling` then tells."""
        scaling = self.train.fit_scaling() if scaling is None else scaling
        validation = self.validation and self.validation.scaled(scaling)
        return self._replace(
            train=self.train.scaled(scaling), validation=validation, test=self.test.scaled(scaling)
        )


def _with_columns(targets: Tensor) -> Tensor:
    return targets[:, None] if targets.dim() == 1 else targets


def _check_targets(targets: Rows) -> None:
    """Raise `InputError` for targets in memory that are all the same."""
    for place, array in targets.found:
        if in_memory(array) and len(array) > 1 and bool((array == array[:1]).all()):
            raise InputError(f"all {len(array)} rows of the {place} are the same: there is nothing to learn")


def _check_deviations(found: Mapping[str, Standard], names: Sequence[str] | None) -> None:
    """Raise `InputError` for a target that the training tasks have one value of."""
    for place, standard in found.items():
        if 0.0 in standard.deviation:
            column = standard.deviation.index(0.0)
            name = names[column] if names and not place else f"number {column}{place}"
            raise InputError(
                f"the target {name!r} is {standard.mean[column]:g} in all rows of the training tasks: there is nothing "
                "to learn from them"
            )
