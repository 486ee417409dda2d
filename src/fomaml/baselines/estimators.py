"""What a practitioner takes without a network: an estimator of scikit-learn, fitted for each task.

It is fitted on the task's support set, alone or together with the pooled examples of the training tasks. `share` says
how the two are weighted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, overload

import torch
from torch import Tensor

from fomaml.baselines.fitting import ESTIMATORS, Fitting, Kind, made, takes_weights
from fomaml.baselines.networks import Scores
from fomaml.baselines.pool import LOOKED_AT, Pool, is_renumbered, tasks_of
from fomaml.baselines.rows import Features
from fomaml.episodes import TaskSequence
from fomaml.errors import InputError, whole
from fomaml.evaluate import judged
from fomaml.learning.contracts import Criterion
from fomaml.measures import exact
from fomaml.metrics import Asked, as_asked
from fomaml.tuning import Choice, Space, Trial, search

TASKS_AT_ONCE = 100  # that are drawn together


SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class Chosen(Generic[Scores]):
    """A baseline's (tasks,) scores, of a list of metrics by name, and the settings that it was tuned to: those of the
    estimator, and `share`.
    """

    scores: Scores
    settings: dict[str, Any]
    trials: list[Trial]


@overload
def fit_estimator(
    estimator: str | Any,
    episodes: TaskSequence,
    *,
    pool: Pool | None = None,
    share: float | None = 0.5,
    options: Mapping[str, Any] | None = None,
    features: Features | None = None,
    tasks: int = 1000,
    criterion: Criterion | None = None,
    metric: Asked = None,
) -> Tensor: ...
@overload
def fit_estimator(
    estimator: str | Any,
    episodes: TaskSequence,
    *,
    pool: Pool | None = None,
    share: float | None = 0.5,
    options: Mapping[str, Any] | None = None,
    features: Features | None = None,
    tasks: int = 1000,
    criterion: Criterion | None = None,
    metric: list[Asked],
) -> dict[str, Tensor]: ...
def fit_estimator(
    estimator: str | Any,
    episodes: TaskSequence,
    *,
    pool: Pool | None = None,
    share: float | None = 0.5,
    options: Mapping[str, Any] | None = None,
    features: Features | None = None,
    tasks: int = 1000,
    criterion: Criterion | None = None,
    metric: Asked | list[Asked] = None,
) -> Tensor | dict[str, Tensor]:
    """(tasks,) float64 scores of an estimator that is fitted anew for each task.

    It sees each example as one row of numbers: all tensors of the inputs side by side, flattened, those of whole
    numbers one-hot (but for bytes).

    estimator: a name of `ESTIMATORS`, the classifier for labels and the regressor for numbers; or an estimator of
        scikit-learn, or one that has its methods, of which a clone is fitted each time.
    pool: examples of the training tasks, see `pooled`. Those of the task itself are left out, of groups of rows.
    share: the support set's share of the weight of all examples: 0 for the pool alone, 1 for the support set alone;
        None to weigh all examples alike, as an estimator must that takes no weights ("nearest"). Without a pool it
        counts for nothing.
    options: of the estimator, by name.
    features: (inputs) → (examples, ...), what the estimator sees instead: a frozen backbone. A module is called in
        evaluation mode.
    criterion, metric: as in `evaluate`; by default the cross-entropy of labels, the squared error of numbers. Outputs
        are log-probabilities where the estimator has probabilities, else what its `decision_function` gives. Of a list
        of metrics the scores of each, by name, of one fit.

    Raises:
        InputError: scikit-learn is not installed; targets that are neither one label for each example nor numbers; a
            pool where classes are numbered anew in each task; a metric of a model; a share that the estimator cannot
            take.
    """
    if pool is not None and is_renumbered(episodes):
        raise InputError(
            "the classes are numbered anew in each task: pooled labels mean nothing there, leave the pool out"
        )
    [first] = tasks_of(episodes, 0, 1, LOOKED_AT)
    of = Kind(first.support.targets, criterion, metric)
    fitting = Fitting(estimator, of, pool, share, dict(options or {}), features)
    found: dict[str, list[Tensor]] = {each.name: [] for each in of.metrics}
    tasks = whole("tasks", tasks, 1)
    for start in range(0, tasks, TASKS_AT_ONCE):
        few = min(TASKS_AT_ONCE, tasks - start)
        for number, task in enumerate(tasks_of(episodes, start, few, LOOKED_AT), start):
            group = getattr(episodes, "group", lambda number: None)(number)
            outputs = fitting.outputs(task, group)
            losses = of.losses(outputs, task)
            for each in of.metrics:
                scored = judged(episodes, each, outputs[None], task.query.targets[None].cpu(), losses)
                found[each.name].append(exact(scored))
    return as_asked(metric, {name: torch.cat(parts) for name, parts in found.items()})


@overload
def tune_estimator(
    estimator: str | Any,
    tuning_episodes: TaskSequence,
    episodes: TaskSequence,
    *,
    trials: int = 20,
    seed: int = 0,
    space: Space | None = None,
    pool: Pool | None = None,
    tasks: int = 1000,
    tuning_tasks: int = 100,
    criterion: Criterion | None = None,
    metric: Asked = None,
    features: Features | None = None,
) -> Chosen[Tensor]: ...
@overload
def tune_estimator(
    estimator: str | Any,
    tuning_episodes: TaskSequence,
    episodes: TaskSequence,
    *,
    trials: int = 20,
    seed: int = 0,
    space: Space | None = None,
    pool: Pool | None = None,
    tasks: int = 1000,
    tuning_tasks: int = 100,
    criterion: Criterion | None = None,
    metric: list[Asked],
    features: Features | None = None,
) -> Chosen[dict[str, Tensor]]: ...
def tune_estimator(
    estimator: str | Any,
    tuning_episodes: TaskSequence,
    episodes: TaskSequence,
    *,
    trials: int = 20,
    seed: int = 0,
    space: Space | None = None,
    pool: Pool | None = None,
    tasks: int = 1000,
    tuning_tasks: int = 100,
    criterion: Criterion | None = None,
    metric: Asked | list[Asked] = None,
    features: Features | None = None,
) -> Chosen[Any]:
    """`fit_estimator` with the best settings on other episodes, out of so many trials of `fomaml.tuning`.

    space: of the options, and of `share`; by default that of the estimator's name, and `SHARES` where there is a pool,
        or the pool alone, the support set alone, and all examples alike for an estimator that takes no weights.
    metric: of a list the first one is tuned by.

    Raises:
        InputError: as `fit_estimator`; nothing to tune.
    """
    [first] = tasks_of(tuning_episodes, 0, 1, LOOKED_AT)
    of = Kind(first.support.targets, criterion, metric)
    leading = of.metrics[0]
    if space is None:
        space = space_of(estimator, of.classes, pool)
    alone = {"share": 1.0 if pool is None else 0.5}

    def run(settings: Mapping[str, Any], episodes: TaskSequence, tasks: int, metric: Any) -> Any:
        own = alone | dict(settings)
        return fit_estimator(
            estimator, episodes, pool=pool, share=own.pop("share"), options=own, features=features, tasks=tasks,
            criterion=criterion, metric=metric,
        )  # fmt: skip

    if not space:
        return Chosen(run({}, episodes, tasks, metric), {}, [])
    best, tried = search(
        space,
        trials,
        lambda settings: run(settings, tuning_episodes, tuning_tasks, leading).mean().item(),
        direction=leading.direction,
        seed=seed,
    )
    return Chosen(run(best.settings, episodes, tasks, metric), best.settings, tried)


def space_of(estimator: str | Any, classes: bool, pool: Pool | None) -> Space:
    """What of an estimator is tuned, see `tune_estimator`. classes: for labels, not for numbers."""
    space = dict(ESTIMATORS[estimator].space) if estimator in list(ESTIMATORS) else {}
    if pool is not None:
        weighs = takes_weights(made(estimator, classes, {}))
        space["share"] = Choice(SHARES if weighs else (None, 0.0, 1.0))
    return space
