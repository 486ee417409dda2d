"""A loss and metrics of the user's own, tried on one task before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fomaml.app.named import own_of
from fomaml.app.own import told
from fomaml.app.scores import metrics_of
from fomaml.app.settings import Settings
from fomaml.data.groups import GroupSource
from fomaml.engines import meta_gradient
from fomaml.episodes import TaskSequence
from fomaml.errors import InputError
from fomaml.evaluate import evaluate_all
from fomaml.learning.learner import MetaLearner
from fomaml.tasks import one


def try_own(settings: Settings, learner: MetaLearner, episodes: TaskSequence) -> None:
    """Raise `InputError` where a loss or a metric that was asked for does not go with the data and the model.

    episodes: the run's, of which the first one is tried.
    """
    if settings.loss is not None:
        alone = one(episodes.batch(0, 1), 0).map(lambda tensor: tensor[None])
        own = own_of(settings, "loss")
        with told(f"the loss {own.name} fails", own.path):
            meta_gradient(learner, alone, engine="loop")  # with derivatives, which may not be there twice
    for name, metric in zip(settings.metric or (), metrics_of(settings)):
        key = f"metric {name}"
        path = (settings.own or {})[key].path if key in (settings.code or {}) else None
        with told(f"the metric {name} fails", path):
            evaluate_all(learner, episodes, [(0, "own")], 1, 1, "loop", False, [metric])


def try_targets(settings: Settings, parts: Mapping[str, Any]) -> None:
    """Raise `InputError` where R² is asked for and a target does not vary within a group, before anything is trained.

    parts: the episodes by part, as far as there are some.
    """
    if "r2" not in (settings.metric or ()):
        return
    for part, episodes in parts.items():
        source = getattr(episodes, "source", None)
        if not isinstance(source, GroupSource):
            continue
        for number, name in enumerate(source.names):
            [positions] = source.positions(number)
            targets = source.take(positions)[1]
            if (targets == targets[:1]).all(0).any():
                raise InputError(
                    f"r2 says nothing of targets that do not vary, as in all {len(positions)} rows of the {part} task "
                    f"{name!r}: take --metric rmse or mae, or leave the task out"
                )
