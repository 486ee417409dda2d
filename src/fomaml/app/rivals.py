"""The baselines of a run, on the same unseen tasks: the same network without meta-learning, and none at all."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fomaml.app import sizing
from fomaml.app.agenda import Noted
from fomaml.app.build import Data, judged_by
from fomaml.app.frozen import backbone_of, body_of, on_vectors
from fomaml.app.named import own_model
from fomaml.app.networks import build_model
from fomaml.app.pretrained import Note, all_learned, numbered_anew
from fomaml.app.scores import headline, metrics_of
from fomaml.app.settings import Settings
from fomaml.baselines import (
    Pool,
    fine_tune,
    nearest_centroid,
    pooled,
    tune_estimator,
    unadapted,
)
from fomaml.errors import InputError
from fomaml.group_episodes import GroupEpisodes
from fomaml.metrics import METRICS, Asked, Metric, OfModel

# label, scores by metric, what is told of it in JSON
Rival = tuple[str, dict[str, Tensor], dict[str, Any]]
POOLED_ROWS = 1000  # that estimators are fitted on beside the support set
START = "random start, support set only"
GIVEN = "the given weights, support set only"
ESTIMATORS = {"nearest": "nearest neighbours", "ridge": "ridge", "forest": "random forest"}
OF_FUNCTIONS = ("nearest", "ridge")  # of a forest there is nothing to gain on a few points of one number


def baselines(
    settings: Settings, data: Data, say: Callable[[str], None], note: Note = lambda kind, cost: None
) -> Iterator[Rival]:
    """Each baseline on the test tasks, with its settings tuned by the first metric: of groups of rows on validation
    tasks, where there are some, else on training classes or tasks.
    """
    of = _of_tasks if data.own_classes is None else _of_classes
    return of(settings, data, say, note)


class _Tuning:
    """How the baselines of a run are tuned and tested."""

    def __init__(self, settings: Settings, data: Data, note: Note):
        self.settings, self.sizes = settings, sizing.of_baselines(settings)
        self.metrics = metrics_of(settings)
        self.judged: dict[str, Any] = {
            **judged_by(settings),
            "metric": list(self.metrics),
            "statistics": settings.statistics,
        }
        self.note = note
        self.tuning: Any = data.tuning
        # what is judged on the validation tasks is not tuned on them
        if data.facts is not None and data.validation is not None and data.validation is not data.test:
            self.tuning = data.validation
        self.test: Any = data.test
        fewer = self.sizes.tasks < settings.test_tasks
        self.few = f", on {self.sizes.tasks} tasks" if fewer else ""

    def fine_tuned(self, model: Any, **choices: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A network that is fine-tuned on each support set: its scores by metric, and what it was tuned to."""
        sizes = self.sizes
        costs = sizing.tuning(self.settings, sizes), sizing.adaptation(self.settings, max(sizes.at_steps))
        tuning, test = self._noted("baselines", *costs)
        best = fine_tune(
            model, tuning, test, tasks=sizes.tasks, tuning_tasks=sizes.tuning_tasks,
            inner_lrs=sizing.INNER_LRS, at_steps=sizes.at_steps, **self.judged, **choices,
        )  # fmt: skip
        return best.scores, {"inner_lr": best.inner_lr, "steps": best.steps}

    def as_it_is(self, model: nn.Module) -> dict[str, Tensor]:
        """The scores of a network that does not adapt."""
        return unadapted(model, self.test, tasks=self.sizes.tasks, **self.judged)

    def estimated(
        self, name: str, pool: Any, body: nn.Module | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """An estimator of scikit-learn, on what a frozen network makes of the inputs if there is one: its scores by
        metric, and what it was tuned to.
        """
        seconds = sizing.FITS[name][pool is not None]
        tuning, test = self._noted("estimators", seconds, seconds, body)
        chosen = tune_estimator(
            name, tuning, test, pool=pool, tasks=self.sizes.tasks, criterion=self.judged["criterion"],
            tuning_tasks=min(self.sizes.tuning_tasks, sizing.FEW_TASKS), metric=self.judged["metric"],
            trials=sizing.trials(self.sizes), seed=self.settings.seed,
        )  # fmt: skip
        return chosen.scores, {"settings": chosen.settings, "trials": len(chosen.trials)}

    def _noted(
        self, kind: str, tuned: float, tested: float, body: nn.Module | None = None
    ) -> tuple[Any, Any]:
        """The tasks to tune and to test on, which tell what one of them costs."""
        tuning, test = self.tuning, self.test
        if body is not None:
            tuning, test = on_vectors(tuning, body), on_vectors(test, body)
        return (
            Noted(tuning, lambda tasks: self.note(kind, tasks * tuned)),
            Noted(test, lambda tasks: self.note(kind, tasks * tested)),
        )


def _of_classes(settings: Settings, data: Data, say: Callable[[str], None], note: Note) -> Iterator[Rival]:
    """The baselines of classes that are numbered anew in each task."""
    how = _Tuning(settings, data, note)
    start = start_of(settings)
    say(f"baseline: the same network from {'a random start' if start == START else 'the given weights'}")
    yield f"{start}{how.few}", *how.fine_tuned(lambda n: build_model(settings, 1000 + n))
    learned = []
    for label, model, _ in all_learned(settings, data, say, note):
        yield f"{label}, fine-tuned{how.few}", *how.fine_tuned(model)
        learned.append((label, model))
    yield from _linear_heads(settings, data, learned, how, say)
    known = [metric for metric in metrics_of(settings) if METRICS.get(metric.name) and metric.name != "loss"]
    if known and known[0].name == headline(settings).name:
        centroids = nearest_centroid(data.test, tasks=settings.test_tasks, metric=list[Asked](known))
        what = "pixels" if settings.features_of is None else "vectors"
        yield f"nearest centroid of the {what}", centroids, {}


def _of_tasks(settings: Settings, data: Data, say: Callable[[str], None], note: Note) -> Iterator[Rival]:
    """The baselines of functions and of groups of rows; where their classes or targets are the same in all tasks also
    what is trained on all training tasks pooled.
    """
    how = _Tuning(settings, data, note)
    learned = []
    for label, model, head in all_learned(settings, data, say, note):
        learned.append((label, model))
        if not numbered_anew(data):
            yield f"{label}, not adapted{how.few}", how.as_it_is(model), {}
        yield f"{label}, fine-tuned{how.few}", *how.fine_tuned(model)
        if head is not None:
            yield f"{label}, head fine-tuned{how.few}", *how.fine_tuned(model, adapted=head)
    start = start_of(settings)
    say(f"baseline: the same network from {'a random start' if start == START else 'the given weights'}")
    yield f"{start}{how.few}", *how.fine_tuned(lambda n: build_model(settings, 1000 + n))
    yield from _linear_heads(settings, data, learned, how, say)
    if why := not_estimated(settings, how.metrics):
        say(f"baseline: nothing without a network: {why}")
        return
    pool = pool_of(settings, data)
    for label, name, with_pool in estimators_of(data):
        yield f"{label}{how.few}", *how.estimated(name, pool if with_pool else None)


def start_of(settings: Settings) -> str:
    """What is said of the network as it is before it has seen a task."""
    return START if settings.model_weights in (None, "random") else GIVEN


def _linear_heads(
    settings: Settings,
    data: Data,
    learned: list[tuple[str, nn.Module]],
    how: _Tuning,
    say: Callable[[str], None],
) -> Iterator[Rival]:
    """A linear head by scikit-learn on each network that does not adapt. learned: those trained on the training tasks,
    of which the user's own lose their heads.
    """
    bodies = list(bodies_of(settings, data, learned))
    if bodies and (why := not_estimated(settings, how.metrics)):
        say(f"baseline: no linear head on a frozen network: {why}")
        return
    for label, body in bodies:
        try:
            found = how.estimated(linear_of(data), None, body)
        except InputError as error:
            say(f"baseline: no {label}: {error}")
        else:
            yield f"{label}{how.few}", *found


def bodies_of(
    settings: Settings, data: Data, learned: list[tuple[str, nn.Module]]
) -> Iterator[tuple[str, nn.Module | None]]:
    """The frozen networks that a linear head goes on, and what is said of it. None: the inputs are vectors of one."""
    if settings.features_of is not None:
        if data.test.ways is not None:  # of numbers it is the ridge that is there anyway
            yield "frozen backbone, linear head", None
    elif (body := backbone_of(settings)) is not None:
        yield "frozen backbone, linear head", body
    elif own_model(settings) and settings.output is None and settings.loss is None:
        for label, model in learned:
            if (body := body_of(settings, model)) is not None:
                yield f"{label}, frozen, linear head", body


def linear_of(data: Data) -> str:
    """The estimator of a linear head: the logistic regression of classes, ridge of numbers."""
    return "ridge" if data.test.ways is None else "logistic"


def estimators(settings: Settings, data: Data) -> list[tuple[str, bool]]:
    """The estimators among the baselines by name, and whether each is fitted on pooled rows too."""
    if not_estimated(settings, metrics_of(settings)):
        return []
    found = (
        [(name, with_pool) for _, name, with_pool in estimators_of(data)] if data.own_classes is None else []
    )
    backbone = settings.features_of is not None or settings.model_weights not in (None, "random")
    return [*found, (linear_of(data), False)] if backbone or own_model(settings) else found


def estimators_of(data: Data) -> Iterator[tuple[str, str, bool]]:
    """What is said of each estimator, its name, and whether it is fitted on pooled rows beside the support set."""
    with_pool = _has_pool(data)
    what = "support set and pooled rows" if with_pool else "support set"
    for name in ESTIMATORS if data.facts is not None else OF_FUNCTIONS:
        yield f"{ESTIMATORS[name]}, {what}", name, with_pool
    if isinstance(data.train, GroupEpisodes) and data.train.source.kind == "regression":
        yield "ridge, support set only", "ridge", False


def _has_pool(data: Data) -> bool:
    """Whether rows of other tasks say something of a task: they do not of another function."""
    return isinstance(data.train, GroupEpisodes) and not data.train.draws_classes


def pool_of(settings: Settings, data: Data) -> Pool | None:
    if not _has_pool(data) or not isinstance(data.train, GroupEpisodes):
        return None
    return pooled(data.train.source, rows=POOLED_ROWS, seed=settings.seed)


def not_estimated(settings: Settings, metrics: list[Metric]) -> str:
    """Why no estimator takes the network's place, in words; "" where one does."""
    if settings.loss is not None:
        return "an estimator has no --loss"
    if any(isinstance(metric.score, OfModel) for metric in metrics):
        return "the metric is of a model"
    if importlib.util.find_spec("sklearn") is None:
        return "it needs scikit-learn, pip install 'fomaml[metrics]'"
    return ""
