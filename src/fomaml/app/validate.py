"""Validation while training: which weights were the best so far, and whether to go on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fomaml.app.build import Data, for_test
from fomaml.app.settings import TrainConfig
from fomaml.errors import InputError
from fomaml.evaluate import Estimate, estimate, evaluate
from fomaml.learning.learner import MetaLearner


@dataclass
class Best:
    """The best of the validations so far; a run that was killed goes on with it, so it is all numbers.

    accuracy, interval: of the best one, at `iteration`. waited: the validations since then.
    """

    accuracy: float = -1.0
    interval: float = 0.0
    iteration: int = 0
    waited: int = 0

    def beaten_by(self, found: Estimate, iteration: int) -> bool:
        """Take note of a validation; whether it is the best so far. Of equals the earlier one is kept."""
        if found.mean > self.accuracy:
            self.accuracy, self.interval = found
            self.iteration, self.waited = iteration, 0
            return True
        self.waited += 1
        return False


def with_validation(config: TrainConfig, data: Data) -> TrainConfig:
    """The settings with the number of iterations between validations: by default a tenth of all, where the data
    has validation classes, else 0.

    Raises:
        InputError: validation was asked for, and the data has no classes for it.
    """
    every = config.validate_every
    if data.validation is not None:
        every = max(1, config.iterations // 10) if every is None else every
    elif every or config.patience is not None:
        option = "--validate-every" if every else "--patience"
        raise InputError(f"{data.unvalidated}; give no {option}, or other data")
    return dataclasses.replace(config, validate_every=every or 0)


def is_due(config: TrainConfig, iteration: int) -> bool:
    """Whether to validate after this iteration: every so many, and after the last."""
    every = config.validate_every
    return bool(every) and (iteration % every == 0 or iteration == config.iterations)


def validate(config: TrainConfig, learner: MetaLearner, data: Data) -> Estimate:
    """The accuracy on the validation tasks after the last of the test's numbers of steps."""
    steps = config.test_steps[-1]
    found = evaluate(
        for_test(config, learner),
        data.validation,
        tasks=config.validation_tasks,
        at_steps=[steps],
        statistics=config.statistics,
    )
    return estimate(found[steps])
