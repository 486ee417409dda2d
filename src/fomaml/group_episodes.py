"""Tasks out of groups of rows, each a pure function of (seed, index): a machine, a subject, a client."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from fomaml.choices import check_choice
from fomaml.data.groups import Draw, GroupSource
from fomaml.devices import sent
from fomaml.draws import checked_seed, generator
from fomaml.episodes import Augment, Augmentation, AugmentTask
from fomaml.errors import InputError, positive, whole
from fomaml.tasks import Batch, Examples, Task, together
from fomaml.trees import leaves, mapped, rebuilt

Small = Literal["refuse", "leave out"]
_Drawn = list[tuple[np.ndarray, np.ndarray]]
FEWEST_CLASSES = 2


class GroupEpisodes:
    """An endless, indexable sequence of tasks, each a group of rows.

    `episodes[i]` is one `Task`; `episodes.batch(i, n)` is the tasks i … i + n - 1, stacked where all sizes are equal,
    else a list of them. Both are pure functions of the seed and the index.

    ways: draw so many of a group's classes for each task, and number them anew in random order, as `Episodes` does: for
        classes that are not the same in all groups. Else a task has all classes of the source, under their own numbers.
    shots, query_shots: the rows of support and query set; of classification for each class of the source. None of query
        rows for all that are left, whose number then differs from task to task.
    draw: "random" rows; the "first" in the group's order for support, and query rows at random from the later ones; or
        "anytime", as "first", but counted from a random row on, so that few groups make many tasks to train on. By
        default the source's: of windows "first", else "random". Query rows of the last two stand in order.
    gap: the rows left out after the last of the support set; of classification in each class. By default the
        source's: of windows so many that no sample is in both sets, else 0.
    in_turn: take the groups one after the other, over and over again, as evaluation does so that all count the same;
        else each task is of a random one.
    small: "refuse" groups that have too few rows, or "leave out" these, which `left_out` then has as (name, rows).
    fewer_classes: take a task without the classes that have too few rows in its group, if two or more are left. Labels
        stay those of the source. Else such groups are too small.
    augment, augment_task: random changes of a set's inputs and of a whole task, see `fomaml.episodes.Augmentation`.
    device: where tensors are put; by default where tensors of the inputs are, else on the CPU.

    Shapes of one task: inputs (examples, ...) as the source has them; targets (examples,) int64 or floating
    (examples, targets, ...). Examples of classification are ordered by class.

    Attributes:
        ways: as given; else the number of classes of the source, of which a task may lack some; None for regression.

    Raises:
        InputError: groups that are too small; windows whose support and query sets would share samples.
    """

    copies = 1

    def __init__(
        self,
        source: GroupSource,
        *,
        shots: int,
        query_shots: int | None,
        ways: int | None = None,
        draw: Draw | None = None,
        gap: int | None = None,
        seed: int = 0,
        in_turn: bool = False,
        small: Small = "refuse",
        fewer_classes: bool = False,
        augment: Augment | None = None,
        augment_task: AugmentTask | None = None,
        device: torch.device | str | None = None,
    ):
        self.shots = positive("shots", shots, integer=True)
        self.query_shots = None if query_shots is None else positive("query_shots", query_shots, integer=True)
        self.draw = source.draw if draw is None else draw
        check_choice("draw", self.draw, Draw)
        check_choice("small", small, Small)
        default = source.gap if self.draw != "random" else 0
        self.gap = whole("gap", default if gap is None else gap)
        if self.draw == "random" and gap:
            raise InputError(f"random rows have no gap between them, got gap {gap}: take draw='first'")
        if (self.draw == "random" and source.least_gap) or self.gap < source.least_gap:
            raise InputError(
                f"windows that overlap would share samples between support and query set, got draw {self.draw!r} and "
                f"gap {self.gap}: take 'first' or 'anytime' with a gap of {source.least_gap} or more, or a longer hop"
            )
        for name, value in (("ways", ways), ("fewer_classes", fewer_classes or None)):
            if value is not None and source.classes is None:
                raise InputError(f"{name} is for classification, the source is of regression")
        if ways is not None and fewer_classes:
            raise InputError(f"{ways} ways are drawn from the classes that suffice: give no fewer_classes")
        self.seed = checked_seed(seed)
        self.in_turn, self.fewer_classes = in_turn, fewer_classes
        self.augmentation = Augmentation(self.seed, augment, augment_task)
        self.device = source.device if device is None else device
        self.draws_classes = ways is not None
        if ways is None:
            self.ways = None if source.classes is None else len(source.classes)
        else:
            self.ways = positive("ways", ways, integer=True)
        self.source, self.left_out = self._large_enough(source, small)
        self._positions: dict[int, list[np.ndarray]] = {}

    @property
    def complete(self) -> bool:
        """Whether each support set has examples of all `ways` classes."""
        return self.ways is not None and not self.fewer_classes

    @property
    def needed(self) -> int:
        """The rows that a group must have, of classification in each class."""
        return self.shots + self.gap + (self.query_shots or 1)

    def __len__(self) -> int:
        """The number of groups that tasks are made of; with `in_turn` so many tasks see each of them once."""
        return len(self.source)

    def __getitem__(self, index: int) -> Task:
        index = whole("the number of a task", index)
        return self._tasks([self._drawn(index)], index)[0]

    def batch(self, start: int, tasks: int) -> Batch:
        """Tasks start … start + tasks - 1, with a leading axis (tasks, ...); a list of them where sizes differ."""
        start, tasks = whole("the number of the first task", start), whole("tasks", tasks)
        return together(self._tasks([self._drawn(start + number) for number in range(tasks)], start))

    def rows(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the source's arrays that the support and the query set of a task are."""
        support, query = map(np.concatenate, zip(*self._drawn(whole("the number of a task", index))))
        return self.source.rows[support], self.source.rows[query]

    def group(self, index: int) -> str:
        """The name of the group that a task is of."""
        return self.source.names[self._group(index, generator(self.seed, index))]

    def classes_of(self, index: int) -> list[str] | None:
        """The names of a task's classes, in the order of its labels; None of regression."""
        if self.source.classes is None or not self.draws_classes:
            return self.source.classes and list(self.source.classes)
        index = whole("the number of a task", index)
        _, numbers = self._classes(index, generator(self.seed, index))
        return [str(self.source.classes[number]) for number in numbers]

    def by_group(self, scores: torch.Tensor) -> torch.Tensor:
        """(groups,) the mean score of each group that has been visited, of the scores (tasks,) of tasks 0, 1 …

        Tasks of one group are not independent: an interval is over the groups.
        """
        groups, places = self._visited(len(scores)).unique(return_inverse=True)
        found = torch.zeros(len(groups), dtype=scores.dtype).index_add(0, places, scores.cpu())
        return found / torch.bincount(places, minlength=len(groups))

    def groups_of(self, tasks: int) -> list[str]:
        """The names of the groups that tasks 0 … tasks - 1 are of, once each, in the order of `by_group`."""
        return [self.source.names[number] for number in self._visited(tasks).unique().tolist()]

    def _visited(self, tasks: int) -> torch.Tensor:
        return torch.tensor([self._group(index, generator(self.seed, index)) for index in range(tasks)])

    # --- which rows -------------------------------------------------------------------------------

    def _group(self, index: int, random: np.random.Generator) -> int:
        number = int(random.integers(len(self.source)))
        return index % len(self.source) if self.in_turn else number

    def _drawn(self, index: int) -> _Drawn:
        """The positions of support and query rows of each class; of regression of all rows."""
        random = generator(self.seed, index)
        own, classes = self._classes(index, random)
        return [self._part(own[number], random) for number in classes]

    def _classes(self, index: int, random: np.random.Generator) -> tuple[list[np.ndarray], list[int]]:
        """The positions of the rows of each class of a task's group, and the numbers of the classes that it has."""
        group = self._group(index, random)
        if group not in self._positions:
            self._positions[group] = self.source.positions(group)
        own = self._positions[group]
        numbers = list(range(len(own)))
        if self.fewer_classes or self.draws_classes:
            numbers = [number for number in numbers if len(own[number]) >= self.needed]
        if self.draws_classes:
            numbers = [numbers[place] for place in random.permutation(len(numbers))[: self.ways]]
        return own, numbers

    def _part(self, own: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Support and query positions out of those of a group, or of one of its classes."""
        queries = self.query_shots
        if self.draw == "random":
            number = len(own) if queries is None else self.shots + queries
            mixed = random.choice(own, number, replace=False)
            return mixed[: self.shots], mixed[self.shots :]
        begin = int(random.integers(len(own) - self.needed + 1)) if self.draw == "anytime" else 0
        later = own[begin + self.shots + self.gap :]
        if queries is not None:
            later = np.sort(random.choice(later, queries, replace=False))
        return own[begin : begin + self.shots], later

    def _large_enough(self, source: GroupSource, small: Small) -> tuple[GroupSource, list[tuple[str, int]]]:
        """The source without the groups that have too few rows, and these.

        Raises:
            InputError: there are some, and they are not to be left out; or there are no others.
        """
        counts = source.counts[:, None] if source.class_counts is None else source.class_counts
        enough = counts >= self.needed
        fewest = (
            self.ways if self.draws_classes else FEWEST_CLASSES if self.fewer_classes else counts.shape[1]
        )
        fits = enough.sum(1) >= (fewest or 1)
        if fits.all():
            return source, []
        few = np.flatnonzero(~fits)
        if small == "leave out" and fits.any():
            left_out = [(source.names[number], int(source.counts[number])) for number in few]
            return source.select([source.names[number] for number in np.flatnonzero(fits)]), left_out
        worst = int(few[counts[few].min(1).argmin()])
        gap = f" + a gap of {self.gap}" if self.gap else ""
        queries = "1 query row or more" if self.query_shots is None else f"{self.query_shots} query rows"
        per, what = "", f"{counts[worst].min()} rows"
        if source.classes is not None:
            per, what = " per class", f"{what} of class {source.classes[int(counts[worst].argmin())]!r}"
        cure = "take fewer" if not fits.any() else "leave them out (small='leave out'), or take fewer"
        if self.draws_classes or self.fewer_classes:
            poorest = int(few[enough[few].sum(1).argmin()])
            raise InputError(
                f"{len(few)} of {len(source)} tasks have too few classes: {source.names[poorest]!r} has "
                f"{enough[poorest].sum()} with the {self.needed} rows that {self.shots} shots{gap} + {queries} need, "
                f"but {fewest} classes are needed; {cure}{' of them' if self.draws_classes else ' rows'}"
            )
        if per and (enough[few].sum(1) >= FEWEST_CLASSES).any():
            cure = f"take a task without the classes that it lacks (fewer_classes=True), {cure}"
        raise InputError(
            f"{len(few)} of {len(source)} tasks have too few rows: {source.names[worst]!r} has {what}, but "
            f"{self.shots} shots{gap} + {queries}{per} need {self.needed}; {cure}: "
            f"half of the tasks have {int(np.median(counts.min(1)))} or more{' of each class' if per else ''}"
        )

    # --- what they hold ---------------------------------------------------------------------------

    def _tasks(self, drawn: Sequence[_Drawn], start: int) -> list[Task]:
        """Tasks of these positions, whose rows are read together. start: the index of the first."""
        if not drawn:
            return []
        classes = [part for own in drawn for part in zip(*own)]  # of each set the positions of each class
        positions = [np.concatenate(part) for part in classes]
        read = Examples(*self.source.take(np.concatenate(positions)))
        if self.draws_classes:
            read = read._replace(targets=torch.cat([_numbered(own) for own in classes]))
        if not self.augmentation and all(leaf.device.type == "cpu" for leaf in leaves(read)):
            read = rebuilt(read, iter(sent(leaves(read), self.device)))
        ends = np.cumsum([len(part) for part in positions])
        parts = [_rows_of(read, begin, end) for begin, end in pairwise([0, *ends])]
        tasks = self.augmentation([Task(*pair) for pair in zip(parts[::2], parts[1::2])], start)
        return [task.to(self.device) for task in tasks]


def _numbered(classes: Sequence[np.ndarray]) -> torch.Tensor:
    """The labels 0, 1 … of rows that stand class after class."""
    return torch.arange(len(classes)).repeat_interleave(torch.tensor([len(own) for own in classes]))


def _rows_of(read: Examples, begin: int, end: int) -> Examples:
    """A part of inputs and targets."""
    return mapped(lambda tensor: tensor[begin:end], read)
