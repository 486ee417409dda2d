"""Whether a plan is compiled, for which of its tasks, and what becomes of it where that cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import torch

from fomaml.engines.common import Found, Group
from fomaml.errors import InputError
from fomaml.learning.learner import MetaLearner
from fomaml.tasks import chunks, shape_of

if TYPE_CHECKING:  # with all that compiling needs of torch: loaded below, where something is compiled
    from fomaml.engines.compiled.trace import Compiled


class Choice(NamedTuple):
    """What follows from a learner, the shapes of its tasks, the device and the number of threads; see `Plan`.

    stacks: whether convolutions are to be stacked when compiled.
    """

    engine: str
    why: str
    tasks_at_once: int
    stacks: bool


class Compiling:
    """What a plan knows of it.

    on: whether the plan is compiled. failure: why it is not although it was to be, as its first call has found, or "".
    unchecked: why it was not compared with the eager engine; "" where it was, None where nothing is compiled yet.
    otherwise: where `compile="auto"` has decided, the choice of an uncompiled plan, which then takes over.
    like: what a group must be like then, see `like_of`.
    stops: raise an error there, as a run goes on that was compiled.
    seen: see `Plan`.
    """

    def __init__(
        self, on: bool, otherwise: Choice | None = None, like: tuple | None = None, stops: bool = False
    ):
        self.on, self.otherwise, self.like, self.stops = on, otherwise, like, stops
        self.failure = ""
        self.unchecked: str | None = None
        self.seen: set[str] = set()

    def takes(self, group: Group, stacked: bool, number: int) -> bool:
        """Whether tasks like these are compiled: stacked ones, and those of a list when they come back. Where "auto"
        has decided, those alone that are like the first ones. number: of groups.
        """
        if not self.on:
            return False
        if self.otherwise is not None:
            if like_of(group) != self.like:
                return False
            stacked = stacked and number == 1
        return stacked or self._came_back(group)

    def _came_back(self, group: Group) -> bool:
        """Whether tasks like these, as many of this shape, have come before: then they are compiled."""
        key = sha256(repr((len(group.rows), group.ways, shape_of(group.tasks))).encode()).hexdigest()[:16]
        came = key in self.seen
        self.seen.add(key)
        return came

    def function(
        self,
        learner: MetaLearner,
        group: Group,
        find: Callable[..., Found],
        choice: Choice,
        autocast: torch.dtype | None,
        fixed: int,
    ) -> tuple[Compiled | None, int]:
        """The compiled function for chunks of a group, and how many tasks they have; None where it cannot be compiled,
        which a warning has then said where compiling was asked for.

        find: what a chunk contributes. fixed: the number that it is divided by.

        Raises:
            InputError: it cannot be, and is to stop there.
        """
        from fomaml.engines.compiled import cache

        # one shape, compiled once
        rows, most = len(group.rows), min(choice.tasks_at_once, len(group.rows))
        size = next(n for n in range(most, 0, -1) if rows % n == 0)
        rest = chunks(group.tasks, size)
        mean = partial(find, tasks=fixed)
        made = cache.function(
            learner,
            next(rest),
            mean,
            (choice.engine, group.ways, autocast, fixed),
            alone=partial(mean, engine="loop") if choice.stacks else None,
            side_by_side=size < rows and size * torch.get_num_threads() <= rows,
            others=rest,
            again=self.otherwise is None,
        )
        own = self.otherwise is not None
        if made.function is None or (made.why and own):  # what was not compared nobody has asked for
            self.failure = self.failure or made.why
        else:
            self.unchecked = self.unchecked or made.why
        if self.failure and self.stops:
            raise InputError(
                f"this run was compiled, and cannot be here: {made.why}; compile=False goes on uncompiled, "
                "which rounds otherwise"
            )
        if self.failure and own:
            self.on = False
            return None, size
        if text := made.warning():
            warnings.warn(
                text, RuntimeWarning, stacklevel=4
            )  # the line that called `meta_gradient` or a plan
        return made.function, size


class Choosing:
    """What a plan has chosen."""

    choice: Choice
    compiling: Compiling

    @property
    def engine(self) -> str:
        return self.choice.engine

    @property
    def why(self) -> str:
        return self.choice.why

    @property
    def tasks_at_once(self) -> int:
        return self.choice.tasks_at_once

    @property
    def compile(self) -> bool:
        return self.compiling.on

    @property
    def seen(self) -> set[str]:
        return self.compiling.seen

    @seen.setter
    def seen(self, seen: set[str]) -> None:
        self.compiling.seen = seen

    def run_eagerly(self, why: str) -> None:
        """Run uncompiled from now on, by the engine that suits that where "auto" has decided."""
        self.compiling.on, self.compiling.failure = False, why
        if own := self.compiling.otherwise:
            self.choice = own._replace(why=f"{own.why}; not compiled: {why}")


def like_of(group: Group) -> tuple:
    """What tasks must have in common that "auto" has decided for."""
    return group.ways, shape_of(group.tasks.map(itemgetter(0)))
