"""The baselines of a run that have something to tune, for a search over their settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from fomaml.app import sizing
from fomaml.app.build import Data, judged_by
from fomaml.app.frozen import on_vectors
from fomaml.app.group_tasks import of_units
from fomaml.app.networks import build_model
from fomaml.app.pretrained import all_learned
from fomaml.app.rivals import bodies_of, estimators_of, linear_of, not_estimated, pool_of, start_of
from fomaml.app.scores import headline
from fomaml.app.settings import Settings
from fomaml.baselines import Pool, fine_tune, fit_estimator, space_of
from fomaml.errors import InputError
from fomaml.tuning import LogUniform, Space


class Method(NamedTuple):
    """What `fomaml tune` searches the settings of: their space, and settings → the validation score.

    score_of_all: the same on all validation tasks, where a trial takes few.
    """

    label: str
    space: Space
    score: Callable[[dict[str, Any]], float]
    score_of_all: Callable[[dict[str, Any]], float] | None = None


def methods(settings: Settings, data: Data, episodes: Any, say: Callable[[str], None]) -> Iterator[Method]:
    """The baselines of a run that have something to tune, each with what it is tuned by: its score on episodes.

    Networks are trained when the method is asked for.
    """
    if not settings.baselines:
        return
    metric = headline(settings)
    judged = judged_by(settings)
    space = {
        "inner_lr": LogUniform(*sizing.SEARCHED_LRS),
        "steps": LogUniform(*sizing.SEARCHED_STEPS, whole=True),
    }

    def fine_tuned(label: str, model: Any, **choices: Any) -> Method:
        def score(changed: dict[str, Any]) -> float:
            options = {
                "inner_lrs": (changed["inner_lr"],),
                "at_steps": (changed["steps"],),
                **choices,
                **judged,
            }
            found = fine_tune(
                model, episodes, episodes, tasks=settings.validation_tasks, tuning_tasks=1, metric=metric,
                statistics=settings.statistics, **options,
            )  # fmt: skip
            return of_units(episodes, found.scores).mean().item()

        return Method(label, space, score)

    yield fine_tuned(start_of(settings), lambda n: build_model(settings, 1000 + n))
    learned = []
    for label, model, head in all_learned(settings, data, say):
        learned.append((label, model))
        yield fine_tuned(f"{label}, fine-tuned", model)
        if head is not None:
            yield fine_tuned(f"{label}, head fine-tuned", model, adapted=head)
    if not_estimated(settings, [metric]):
        return
    classes = settings.kind == "classification" or data.own_classes is not None

    def fitted(label: str, name: str, pool: Pool | None, tasks: Any) -> Method:
        def score(number: int, changed: dict[str, Any]) -> float:
            options = dict(changed)
            found = fit_estimator(
                name, tasks, pool=pool, share=options.pop("share", 1.0), options=options, metric=metric,
                tasks=number, criterion=judged["criterion"],
            )  # fmt: skip
            return of_units(episodes, found).mean().item()

        every = settings.validation_tasks
        few = min(every, sizing.FEW_TASKS)
        of_all = partial(score, every) if few < every else None
        return Method(label, space_of(name, classes, pool), partial(score, few), of_all)

    for label, body in bodies_of(settings, data, learned):
        try:
            tasks = episodes if body is None else on_vectors(episodes, body)
        except InputError as error:
            say(f"baseline: no {label}: {error}")
        else:
            yield fitted(label, linear_of(data), None, tasks)
    if data.own_classes is None:
        pool = pool_of(settings, data)
        for label, name, with_pool in estimators_of(data):
            yield fitted(label, name, pool if with_pool else None, episodes)
