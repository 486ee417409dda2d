"""Validation while training: which weights were the best so far, and whether to go on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fomaml.app.build import Data, for_test
from fomaml.app.group_tasks import of_units
from fomaml.app.scores import headline
from fomaml.app.settings import Settings
from fomaml.errors import InputError
from fomaml.evaluate import Estimate, estimate, evaluate_all
from fomaml.learning.learner import MetaLearner
from fomaml.models import warn_of_unmoved
from fomaml.scoring import metrics_of


@dataclass
class Best:
    """The best of the validations so far; a run that was killed goes on with it, so it is all numbers.

    accuracy, interval: of the best one, whatever the metric, at `iteration`. waited: the validations since then.
    by_steps: the means of the best one after each of the test's numbers of steps, which are text, as keys of JSON are.
    """

    accuracy: float = -1.0
    interval: float = 0.0
    iteration: int = 0
    waited: int = 0
    by_steps: dict[str, float] = field(default_factory=dict)

    def beaten_by(
        self, found: Estimate, iteration: int, direction: int = 1, by_steps: Mapping[str, float] | None = None
    ) -> bool:
        """Take note of a validation; whether it is the best so far. Ties keep the earlier one.

        direction: the metric's.
        """
        first = not self.iteration and not math.isnan(found.mean)
        if first or direction * found.mean > direction * self.accuracy:
            self.accuracy, self.interval = found
            self.iteration, self.waited, self.by_steps = iteration, 0, dict(by_steps or {})
            return True
        self.waited += 1
        return False


def with_validation(settings: Settings, data: Data) -> Settings:
    """The settings with the number of iterations between validations: by default a tenth of all, where the data
    has validation classes, else 0.

    Raises:
        InputError: validation was asked for, and the data has no classes for it.
    """
    every = settings.validate_every
    if data.validation is not None:
        every = max(1, settings.iterations // 10) if every is None else every
    elif every or settings.patience is not None:
        option = "--validate-every" if every else "--patience"
        raise InputError(f"{data.unvalidated}; give no {option}, or other data")
    return dataclasses.replace(settings, validate_every=every or 0)


def is_due(settings: Settings, iteration: int) -> bool:
    """Whether to validate after this iteration: every so many, and after the last."""
    every = settings.validate_every or 0
    return every > 0 and (iteration % every == 0 or iteration == settings.iterations)


def validate(settings: Settings, learner: MetaLearner, data: Data, group: Any = None) -> dict[int, Estimate]:
    """The scores on the validation tasks after each of the test's numbers of steps; the last one's chooses weights.

    group: see `evaluate`.
    """
    assert data.validation is not None  # as `with_validation` has made sure
    tested = for_test(settings, learner)
    warn_of_unmoved(tested.model)
    # what is compiled is kept with the learner, and serves all validations of a run
    times = (
        settings.iterations // (settings.validate_every or settings.iterations) if tested is learner else 1
    )
    points = [(steps, settings.statistics) for steps in settings.test_steps]
    number, metrics = settings.validation_tasks, metrics_of(tested, [headline(settings)])
    [found] = evaluate_all(
        tested, data.validation, points, number, 100, "auto", False, metrics, group, times=times
    ).values()
    return {steps: estimate(of_units(data.validation, scores)) for (steps, _), scores in found.items()}
