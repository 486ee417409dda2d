"""A seeded search over settings: each trial is a pure function of seed and number, and is recorded with its score.

The points are those of a scrambled Sobol sequence (Owen 1998), by torch. They fill the space more evenly than
independent draws do, which in turn beat a grid where few settings matter (Bergstra and Bengio 2012). Searches that
learn from earlier trials, as those of the library optuna do, would make a trial depend on those that were finished
before it, and with some twenty trials begin no better.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from fomaml.errors import InputError, plain, positive, shown, whole

DIGITS = 3  # significant ones of a number that is tried, so that what is recorded and typed is what was tried
SEEDS = 2**63  # of torch's generator


class Dimension(Protocol):
    """One setting, and the values that it may take."""

    def at(self, share: float, /) -> Any:
        """The value at a share from 0 to below 1 of its range, JSON-able."""
        ...


@dataclass(frozen=True)
class LogUniform:
    """Numbers from `low` to `high`, each order of magnitude as likely as any other; with `whole` whole numbers."""

    low: float
    high: float
    whole: bool = False

    def __post_init__(self):
        positive("low", self.low, integer=self.whole)
        positive("high", self.high, integer=self.whole)
        if self.high < self.low:
            raise InputError(f"high must be {self.low:g}, the low, or more, got {self.high:g}")

    def at(self, share: float) -> float:
        top = self.high + 1 if self.whole else self.high
        value = self.low * (top / self.low) ** share
        return min(int(value), int(self.high)) if self.whole else _rounded(value, self.low, self.high)


@dataclass(frozen=True)
class Uniform:
    """Numbers from `low` to `high`, all as likely."""

    low: float
    high: float

    def __post_init__(self):
        if not -math.inf < self.low <= self.high < math.inf:
            raise InputError(f"low and high must be finite and in this order, got {self.low} and {self.high}")

    def at(self, share: float) -> float:
        return _rounded(self.low + share * (self.high - self.low), self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """One of some values, all as likely; they must be JSON-able."""

    options: Sequence[Any]

    def __post_init__(self):
        if isinstance(self.options, str) or not len(self.options):
            raise InputError(f"a Choice is of a list of one or more values, got {shown(self.options)}")

    def at(self, share: float) -> Any:
        return self.options[int(share * len(self.options))]


Space = Mapping[str, Dimension]


class Trial(NamedTuple):
    """What was tried, and what it was worth.

    score: None where it failed. reason: why it failed; or what it has warned of, "" for nothing.
    """

    number: int
    settings: dict[str, Any]
    score: float | None
    reason: str = ""


class Found(NamedTuple):
    """The best trial of a search, and all of them in order."""

    best: Trial
    trials: list[Trial]


def settings_of(space: Space, seed: int, number: int) -> dict[str, Any]:
    """The settings of a trial, a pure function of its arguments; the order of the space counts too.

    Raises:
        InputError: an empty space.
    """
    if not space:
        raise InputError("there is nothing to search: the space is empty")
    seed = whole("seed", seed, below=SEEDS, range=f" from 0 to {SEEDS - 1}")
    engine = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=seed)
    engine.fast_forward(whole("the number of a trial", number))
    [shares] = engine.draw(1, dtype=torch.float64).tolist()
    return {name: dimension.at(share) for (name, dimension), share in zip(space.items(), shares)}


def search(
    space: Space,
    trials: int,
    score: Callable[[dict[str, Any]], float],
    *,
    direction: int = 1,
    seed: int = 0,
    finished: Iterable[Trial] = (),
    note: Callable[[Trial], None] = lambda trial: None,
) -> Found:
    """Try so many settings, and find those with the best score.

    score: settings → a number, on validation tasks. A trial that raises `InputError`, as one that diverges does, or
        whose score is not finite, has failed, and is worse than all others. `RuntimeWarning`s are kept as its reason.
    direction: 1 if more is better, -1 if less is. Of equal scores the earlier trial is better.
    finished: trials of this search from before, as `note` was told of them; they are not tried again.
    note: is told of each trial as it ends.

    Raises:
        InputError: all trials have failed, with the reason of the first; finished trials of another search.
    """
    trials = whole("trials", trials, 1)
    if direction not in (1, -1):
        raise InputError(f"direction is 1 or -1, got {shown(direction)}")
    known = _checked(space, seed, finished)
    found = []
    for number in range(trials):
        trial = known.get(number)
        if trial is None:
            trial = _tried(number, settings_of(space, seed, number), score)
            note(trial)
        found.append(trial)
    return Found(best_of(found, direction), found)


def best_of(trials: Sequence[Trial], direction: int = 1) -> Trial:
    """The trial with the best score.

    Raises:
        InputError: all have failed.
    """
    scored = [(direction * trial.score, -trial.number, trial) for trial in trials if trial.score is not None]
    if not scored:
        text = f"; the first one: {trials[0].reason}" if trials else ""
        raise InputError(f"all {len(trials)} trials have failed{text}")
    return max(scored)[2]


def _tried(number: int, settings: dict[str, Any], score: Callable[[dict[str, Any]], float]) -> Trial:
    with _warnings() as told:
        try:
            found = plain(score(dict(settings)))
        except InputError as error:
            return Trial(number, settings, None, str(error))
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise InputError(f"a score is a number, got {shown(found)}")
    if not math.isfinite(found):
        return Trial(number, settings, None, f"the score is {found}")
    return Trial(number, settings, float(found), "; ".join(told))


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """The texts of the `RuntimeWarning`s within it, once it is over; all others are passed on."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        yield texts
    for each in caught:
        if issubclass(each.category, RuntimeWarning):
            texts.append(str(each.message))
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _checked(space: Space, seed: int, finished: Iterable[Trial]) -> dict[int, Trial]:
    known = {}
    for trial in finished:
        expected = settings_of(space, seed, trial.number)
        if trial.settings != expected:
            raise InputError(
                f"trial {trial.number} of the record has {shown(trial.settings)}, but this search has "
                f"{shown(expected)}: it is of another space or seed"
            )
        known[trial.number] = trial
    return known


def _rounded(value: float, low: float, high: float) -> float:
    return min(max(float(f"{value:.{DIGITS}g}"), float(low)), float(high))


def to_json(trial: Trial) -> dict[str, Any]:
    """A trial as a JSON-able dict; `from_json` reads it."""
    return trial._asdict()


def from_json(given: Mapping[str, Any]) -> Trial:
    """What `to_json` has given.

    Raises:
        InputError: something else.
    """
    try:
        return Trial(**given)
    except TypeError:
        raise InputError(f"expected a trial as tuning.to_json gives it, got {shown(given)}") from None
