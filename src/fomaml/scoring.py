"""What a learner is scored by, and the scores of a batch of tasks at some number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fomaml.engines import Plan
from fomaml.engines.common import Measure
from fomaml.learning.learner import MetaLearner
from fomaml.metrics import LOSS, Asked, Metric, OfModel, metrics_for, name_of, scores
from fomaml.tasks import Batch, Task
from fomaml.trees import Tree


def scores_at(plan: Plan, tasks: Batch, metric: Metric, steps: int, ways: int | None = None) -> Tensor:
    """(tasks,) the scores of the query sets after so many inner steps, in the precision of training."""
    with plan.precision(tasks):
        [(losses, outputs)] = plan.curve(
            tasks, [(steps, "own")], measured_for(plan.learner, metric), ways=ways
        )
    return scores(metric, outputs, query_targets(tasks), losses)


def query_targets(tasks: Batch) -> Tree | list[Tree]:
    """Those of a batch, of a list of tasks as a list."""
    return tasks.query.targets if isinstance(tasks, Task) else [task.query.targets for task in tasks]


def weighted_mean(values: Tensor, weights: Sequence[float] | None) -> Tensor:
    if weights is None:
        return values.mean()
    own = values.new_tensor(weights)
    return (values * own).sum() / own.sum()


def metrics_of(learner: MetaLearner, asked: Sequence[Asked]) -> list[Metric]:
    """The metrics that are asked for, see `evaluate`.

    Raises:
        InputError: an unknown name, something else, or two of one name.
    """
    if learner.loss is None:
        return metrics_for(learner.criterion, asked)
    return metrics_for(None, [_of_model(each) for each in asked])


def _of_model(asked: Any) -> Asked:
    """What is asked for of a learner with a loss: a function is one of the model, as the loss is."""
    if asked is None or isinstance(asked, str | Metric | type) or not callable(asked):
        return asked
    return Metric(name_of(asked), OfModel(asked), 1, "")


def measured_for(learner: MetaLearner, metric: Metric) -> Measure | bool:
    """What a metric needs beside losses and the outputs that a criterion judges, see `Plan.curve`."""
    if isinstance(metric.score, OfModel):
        return metric.score.measure
    return learner.loss is not None and metric is not LOSS
