"""What a run still has to do, and how long that will take."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fomaml.app import sizing
from fomaml.app.settings import Settings

# Whose pace counts as long as a kind of work has none of its own: test and validation do the same. The cost of
# estimators, which run no network, is in seconds already.
LIKE = {"validation": "training", "test": "validation", "baselines": "test"}
IN_SECONDS = ("estimators",)
EARLY = 0.05  # of a kind of work, whose pace says little yet
# What is going on, how much of it is done, of how much, and the seconds that the whole run has left.
Progress = Callable[[str, float, float, float], None]


class Agenda:
    """The kinds of work of a run, what is done of each and in how many seconds.

    A kind that has not begun is taken to go at the pace of the one most like it.
    """

    def __init__(self, settings: Settings, estimators: Iterable[tuple[str, bool]] = ()):
        """estimators: those among the baselines, see `sizing.fits`."""
        sizes = sizing.of_baselines(settings)._replace(validation_tasks=settings.validation_tasks)
        self.settings = settings
        self.of_validation = sizing.validation(settings, sizes)
        self.totals = {
            "training": sizing.training(settings),
            "validation": sizing.validations(settings) * self.of_validation
            if settings.validate_every
            else 0.0,
            "test": sizing.test(settings),
            "baselines": sizing.baselines(settings, sizes),
            "estimators": sizing.fits(settings, sizes, estimators),
        }
        self.done = dict.fromkeys(self.totals, 0.0)
        self.seconds = dict.fromkeys(self.totals, 0.0)

    def trained(self, iteration: int, seconds: float, validations: float) -> None:
        """Take note of the training so far; validations: the seconds that they took."""
        settings = self.settings
        done = iteration * self.totals["training"] / settings.iterations
        if settings.seconds and seconds:  # as many iterations as fit
            iterations = max(iteration, iteration * settings.seconds / seconds)
            settings = self.settings = dataclasses.replace(settings, iterations=max(1, round(iterations)))
            done = iteration * sizing.training(settings) / settings.iterations
            self.totals["training"] = sizing.training(settings)
            if settings.validate_every:
                self.totals["validation"] = sizing.validations(settings) * self.of_validation
        self.done["training"], self.seconds["training"] = done, seconds
        if settings.validate_every:
            self.done["validation"] = iteration // settings.validate_every * self.of_validation
            self.seconds["validation"] = validations

    def left(self) -> float:
        """The seconds left, nan as long as nothing has been done."""
        return sum(
            (total - self.done[kind]) * self._pace(kind)
            for kind, total in self.totals.items()
            if total > self.done[kind]
        )

    def counter(self, kind: str, what: str, total: float, tell: Progress) -> Callable[[float], None]:
        """A function to be told of each part of some work as it begins, by its cost; `total` is that of all of it."""
        before, seconds, began = self.done[kind], self.seconds[kind], time.perf_counter()
        done = 0.0

        def note(cost: float) -> None:
            nonlocal done
            so_far = min(done, total)
            self.done[kind], self.seconds[kind] = before + so_far, seconds + time.perf_counter() - began
            tell(what, so_far, total, self.left())
            done += cost

        return note

    def finish(self, kind: str) -> None:
        """The whole of a kind of work is done."""
        self.done[kind] = self.totals[kind]

    def _pace(self, kind: str) -> float:
        begun = self.done[kind] > EARLY * self.totals[kind] or kind == "training"
        if begun and self.done[kind] and self.seconds[kind]:
            return self.seconds[kind] / self.done[kind]
        if kind in IN_SECONDS:
            return 1.0
        return self._pace(LIKE[kind]) if kind in LIKE else math.nan


@dataclasses.dataclass
class Clock:
    """The seconds spent on each thing, over all the processes that a run took."""

    training: float = 0.0
    validation: float = 0.0

    @contextlib.contextmanager
    def counting(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        setattr(self, what, getattr(self, what) + time.perf_counter() - began)


class Noted:
    """Episodes, or classes, that say what is drawn of them: `note` is told the number of tasks, or of examples."""

    def __init__(self, source: Any, note: Callable[[int], None]):
        self._of, self.note = source, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def __len__(self) -> int:
        return len(self._of)

    def batch(self, start: int, tasks: int) -> Any:
        if tasks > 1:  # one alone is looked at, for its shapes
            self.note(tasks)
        return self._of.batch(start, tasks)

    def take(self, rows: Any) -> Any:
        self.note(len(rows))
        return self._of.take(rows)
