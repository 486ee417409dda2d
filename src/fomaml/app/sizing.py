"""What a run costs, counted in examples through the network, and how large its validation and its baselines are.

Everything here follows from the settings alone, never from measured time, so that a run repeats bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from fomaml.app.defaults import DEFAULTS
from fomaml.app.settings import Settings
from fomaml.app.sources import source_of

PASSES = 3  # of an example that is learned from: forward, and backward at twice the cost
INNER_LRS = (0.001, 0.003, 0.01, 0.03, 0.1)  # that baselines are tuned over
SEARCHED_LRS, SEARCHED_STEPS = (0.001, 1.0), (1, 100)  # that `fomaml tune` searches for them
BATCH = 128  # of the classifiers' pretraining
FEW_TASKS = 10  # that estimators are tuned on, each of which is fitted anew
# Seconds of one fit on one core of 2026, on the support set alone and with a thousand pooled rows: time is estimated by
# them until it has been measured, and nothing else follows from them.
FITS = {
    "nearest": (0.003, 0.003),
    "ridge": (0.003, 0.003),
    "logistic": (0.03, 0.03),
    "forest": (0.1, 0.3),
}
VALIDATIONS = 10  # by default
LEAST = 0.1  # share of the full sizes below which rather the steps of the baselines are cut


class Sizes(NamedTuple):
    """validation_tasks: of each validation. tasks: of the test's, that baselines stand on. tuning_tasks, at_steps: what
    they are tuned on. pretraining: the iterations of the classifiers.
    """

    validation_tasks: int
    tasks: int
    tuning_tasks: int
    at_steps: tuple[int, ...]
    pretraining: int


def full(settings: Settings) -> Sizes:
    """The sizes of a run that is as long as its source's default."""
    return Sizes(200, settings.test_tasks, min(settings.test_tasks, 50), (5, 20, 50, 100), 1000)


def least(settings: Settings) -> Sizes:
    """The smallest sizes that still tell something."""
    return Sizes(20, min(settings.test_tasks, 100), min(settings.test_tasks, 5), (5, 20), 100)


def sized(settings: Settings) -> Sizes:
    """The sizes with which validation and baselines together cost at most about as much as the training.

    A run of as many training tasks as the source's default, or more, has the full sizes: all kept figures are of such.
    """
    whole, few = full(settings), least(settings)
    if not is_short(settings):
        return whole
    for number in (4, 3, 2):
        whole = whole._replace(at_steps=whole.at_steps[:number])
        cost = validations(settings) * validation(settings, whole) + baselines(settings, whole)
        share = min(1.0, training(settings) / cost) if cost else 1.0
        if share >= LEAST:
            break
    counts = {
        name: max(getattr(few, name), round(share * getattr(whole, name)))
        for name in ("validation_tasks", "tasks", "tuning_tasks", "pretraining")
    }
    return whole._replace(**counts)


def is_short(settings: Settings) -> bool:
    """Whether a run has fewer training tasks than its source's default."""
    suited = source_of(settings).defaults[settings.question or ""]
    usual = {**DEFAULTS, **suited[max((few for few in suited if few <= settings.shots), default=min(suited))]}
    usual_tasks = usual["iterations"] * usual["meta_batch_size"]
    return settings.iterations * settings.meta_batch_size < usual_tasks


def of_baselines(settings: Settings) -> Sizes:
    """The sizes of the run's baselines."""
    return full(settings) if settings.baseline_size == "full" else sized(settings)


def training(settings: Settings) -> float:
    """The cost of the training."""
    task = settings.inner_steps * settings.train_shots + settings.query_shots
    return settings.iterations * settings.meta_batch_size * PASSES * settings.train_ways * task


def adaptation(settings: Settings, steps: int, points: int = 1) -> float:
    """The cost of one task that is adapted to by so many steps, and judged at so many points."""
    ways = 1 if source_of(settings).kind == "regression" else settings.ways
    support, query = PASSES * steps * settings.shots, points * settings.test_query_shots
    return ways * settings.test_copies * (support + query)


def validations(settings: Settings) -> int:
    """How many validations a run has, if the data have classes for it."""
    every = settings.validate_every
    if every is None:
        return min(VALIDATIONS, settings.iterations)
    return math.ceil(settings.iterations / every) if every else 0


def validation(settings: Settings, sizes: Sizes) -> float:
    """The cost of one validation."""
    return sizes.validation_tasks * adaptation(settings, settings.test_steps[-1])


def test(settings: Settings) -> float:
    """The cost of the test of the learner."""
    return settings.test_tasks * adaptation(settings, settings.test_steps[-1], len(settings.test_steps))


def tuning(settings: Settings, sizes: Sizes) -> float:
    """The cost of one task that a baseline is tuned on, with one step size."""
    return adaptation(settings, max(sizes.at_steps), len(sizes.at_steps))


def baselines(settings: Settings, sizes: Sizes) -> float:
    """The cost of all baselines that are networks; nothing where there are none."""
    if not settings.baselines:
        return 0.0
    trained = 1 if settings.augment == "none" else 2
    # the pooled network, and its head alone
    tuned = trained + (source_of(settings).kind == "regression" or bool(settings.fixed_classes))
    each = len(INNER_LRS) * sizes.tuning_tasks * tuning(settings, sizes)
    each += sizes.tasks * adaptation(settings, max(sizes.at_steps))
    return (1 + tuned) * each + trained * PASSES * BATCH * sizes.pretraining


def trials(sizes: Sizes) -> int:
    """How many settings each baseline is tuned by."""
    return len(INNER_LRS) * len(sizes.at_steps)


def fits(settings: Settings, sizes: Sizes, estimators: Iterable[tuple[str, bool]]) -> float:
    """The seconds that estimators are taken to need. estimators: the name of each, and whether pooled rows join in."""
    if not settings.baselines:
        return 0.0
    number = trials(sizes) * min(sizes.tuning_tasks, FEW_TASKS) + sizes.tasks
    return sum(number * FITS[name][with_pool] for name, with_pool in estimators)
