"""The baselines of a run, on the same unseen tasks: the same network without meta-learning, and none at all."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fomaml.app import sizing
from fomaml.app.agenda import Noted
from fomaml.app.build import Data, judged_by
from fomaml.app.group_tasks import of_units
from fomaml.app.named import foreign_model
from fomaml.app.networks import build_model, head_of
from fomaml.app.scores import headline, metrics_of
from fomaml.app.settings import Settings
from fomaml.baselines import (
    Pool,
    fine_tune,
    fit_estimator,
    nearest_centroid,
    pooled,
    pretrain,
    space_of,
    tune_estimator,
    unadapted,
)
from fomaml.episodes import RegressionEpisodes
from fomaml.errors import InputError
from fomaml.group_episodes import GroupEpisodes
from fomaml.metrics import METRICS, Asked, Metric, OfModel
from fomaml.tuning import LogUniform, Space


class Method(NamedTuple):
    """What `fomaml tune` searches the settings of: their space, and settings → the validation score.

    score_of_all: the same on all validation tasks, where a trial takes few.
    """

    label: str
    space: Space
    score: Callable[[dict[str, Any]], float]
    score_of_all: Callable[[dict[str, Any]], float] | None = None


# label, scores by metric, what is told of it in JSON
Rival = tuple[str, dict[str, Tensor], dict[str, Any]]
Note = Callable[[str, float], None]  # of a kind of work of the agenda, its cost as a part of it begins
POOLED_ROWS = 1000  # that estimators are fitted on beside the support set
START = "random start, support set only"
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

    def estimated(self, name: str, pool: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """An estimator of scikit-learn: its scores by metric, and what it was tuned to."""
        seconds = sizing.FITS[name][pool is not None]
        tuning, test = self._noted("estimators", seconds, seconds)
        chosen = tune_estimator(
            name, tuning, test, pool=pool, tasks=self.sizes.tasks, criterion=self.judged["criterion"],
            tuning_tasks=min(self.sizes.tuning_tasks, sizing.FEW_TASKS), metric=self.judged["metric"],
            trials=sizing.trials(self.sizes), seed=self.settings.seed,
        )  # fmt: skip
        return chosen.scores, {"settings": chosen.settings, "trials": len(chosen.trials)}

    def _noted(self, kind: str, tuned: float, tested: float) -> tuple[Any, Any]:
        """The tasks to tune and to test on, which tell what one of them costs."""
        return (
            Noted(self.tuning, lambda tasks: self.note(kind, tasks * tuned)),
            Noted(self.test, lambda tasks: self.note(kind, tasks * tested)),
        )


class Learned(NamedTuple):
    """A network that has learned all training tasks together. head: the globs of its head, where that means something
    in a new task.
    """

    label: str
    model: nn.Module
    head: str | None = None


def _learned(
    settings: Settings, data: Data, say: Callable[[str], None], note: Note = lambda kind, cost: None
) -> Iterator[Learned]:
    """The networks that have learned all training tasks, or classes, each trained when it is asked for."""
    iterations = sizing.of_baselines(settings).pretraining
    groups = data.train.source if isinstance(data.train, GroupEpisodes) else None
    if not _anew(data):
        say("baseline: the same network trained on all training tasks pooled")
        examples = _noted(data.train if groups is None else groups, note, settings)
        model = build_model(settings)
        options: dict[str, Any] = {"batch_size": sizing.BATCH, "seed": settings.seed}
        pretrain(model, examples, iterations=iterations, **options, **judged_by(settings))
        head = head_of(settings, model)
        yield Learned("all tasks pooled", model, head if head is None or "*" in head else f"{head}.*")
        return
    known: dict[str, Any] = {"pretrained classifier": groups or data.own_classes}
    if settings.augment != "none":
        known["pretrained on augmented"] = data.classes
    if why := not_pretrained(settings):
        say(f"baseline: no pretrained classifier: {why}")
        return
    for label, classes in known.items():
        number = len(getattr(classes, "classes", None) or classes)
        say(f"baseline: the same network pretrained as a classifier of {number} classes")
        yield Learned(label, pretrained(settings, _noted(classes, note, settings), number, iterations))


def _of_classes(settings: Settings, data: Data, say: Callable[[str], None], note: Note) -> Iterator[Rival]:
    """The baselines of classes that are numbered anew in each task."""
    how = _Tuning(settings, data, note)
    say("baseline: the same network from a random start")
    yield f"{START}{how.few}", *how.fine_tuned(lambda n: build_model(settings, 1000 + n))
    for label, model, _ in _learned(settings, data, say, note):
        yield f"{label}, fine-tuned{how.few}", *how.fine_tuned(model)
    known = [metric for metric in metrics_of(settings) if METRICS.get(metric.name) and metric.name != "loss"]
    if known and known[0].name == headline(settings).name:
        centroids = nearest_centroid(data.test, tasks=settings.test_tasks, metric=list[Asked](known))
        yield "nearest centroid of the pixels", centroids, {}


def _of_tasks(settings: Settings, data: Data, say: Callable[[str], None], note: Note) -> Iterator[Rival]:
    """The baselines of functions and of groups of rows; where their classes or targets are the same in all tasks also
    what is trained on all training tasks pooled.
    """
    how = _Tuning(settings, data, note)
    for label, model, head in _learned(settings, data, say, note):
        if not _anew(data):
            yield f"{label}, not adapted{how.few}", how.as_it_is(model), {}
        yield f"{label}, fine-tuned{how.few}", *how.fine_tuned(model)
        if head is not None:
            yield f"{label}, head fine-tuned{how.few}", *how.fine_tuned(model, adapted=head)
    say("baseline: the same network from a random start")
    yield f"{START}{how.few}", *how.fine_tuned(lambda n: build_model(settings, 1000 + n))
    if why := _not_estimated(settings, how.metrics):
        say(f"baseline: nothing without a network: {why}")
        return
    pool = _pool(settings, data)
    for label, name, with_pool in _estimators(data):
        yield f"{label}{how.few}", *how.estimated(name, pool if with_pool else None)


def estimators(settings: Settings, data: Data) -> list[tuple[str, bool]]:
    """The estimators among the baselines by name, and whether each is fitted on pooled rows too."""
    if data.own_classes is not None or _not_estimated(settings, metrics_of(settings)):
        return []
    return [(name, with_pool) for _, name, with_pool in _estimators(data)]


def _estimators(data: Data) -> Iterator[tuple[str, str, bool]]:
    """What is said of each estimator, its name, and whether it is fitted on pooled rows beside the support set."""
    with_pool = _has_pool(data)
    what = "support set and pooled rows" if with_pool else "support set"
    for name in ESTIMATORS if data.facts is not None else OF_FUNCTIONS:
        yield f"{ESTIMATORS[name]}, {what}", name, with_pool
    if isinstance(data.train, GroupEpisodes) and data.train.source.kind == "regression":
        yield "ridge, support set only", "ridge", False


def _anew(data: Data) -> bool:
    """Whether classes are numbered anew in each task."""
    return data.own_classes is not None or (
        isinstance(data.train, GroupEpisodes) and data.train.draws_classes
    )


def _has_pool(data: Data) -> bool:
    """Whether rows of other tasks say something of a task: they do not of another function."""
    return isinstance(data.train, GroupEpisodes) and not data.train.draws_classes


def _pool(settings: Settings, data: Data) -> Pool | None:
    if not _has_pool(data) or not isinstance(data.train, GroupEpisodes):
        return None
    return pooled(data.train.source, rows=POOLED_ROWS, seed=settings.seed)


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

    yield fine_tuned(START, lambda n: build_model(settings, 1000 + n))
    for label, model, head in _learned(settings, data, say):
        yield fine_tuned(f"{label}, fine-tuned", model)
        if head is not None:
            yield fine_tuned(f"{label}, head fine-tuned", model, adapted=head)
    if data.own_classes is not None or _not_estimated(settings, [metric]):
        return
    pool_of_all = _pool(settings, data)
    for label, name, with_pool in _estimators(data):
        pool = pool_of_all if with_pool else None

        def score(tasks: int, changed: dict[str, Any], name: str = name, pool: Pool | None = pool) -> float:
            options = dict(changed)
            found = fit_estimator(
                name, episodes, pool=pool, share=options.pop("share", 1.0), options=options, metric=metric,
                tasks=tasks, criterion=judged["criterion"],
            )  # fmt: skip
            return of_units(episodes, found).mean().item()

        space = space_of(name, settings.kind == "classification", pool)
        every = settings.validation_tasks
        few = min(every, sizing.FEW_TASKS)
        yield Method(label, space, partial(score, few), partial(score, every) if few < every else None)


def _noted(source: Any, note: Note, settings: Settings) -> Any:
    """A source, or episodes of functions, whose drawing tells what was learned from."""
    each = sizing.PASSES
    if isinstance(source, RegressionEpisodes):  # whole tasks
        each *= settings.train_shots + settings.query_shots
    return Noted(source, lambda number: note("baselines", number * each))


def _not_estimated(settings: Settings, metrics: list[Metric]) -> str:
    """Why no estimator takes the network's place, in words; "" where one does."""
    if settings.loss is not None:
        return "an estimator has no --loss"
    if any(isinstance(metric.score, OfModel) for metric in metrics):
        return "the metric is of a model"
    if importlib.util.find_spec("sklearn") is None:
        return "it needs scikit-learn, pip install 'fomaml[metrics]'"
    return ""


def not_pretrained(settings: Settings) -> str:
    """Why the run's network cannot be pretrained as a classifier, in words; "" where it can."""
    if settings.loss is not None or settings.output is not None:
        return "what its outputs are is said by " + ("--loss" if settings.loss is not None else "--output")
    try:
        model = build_model(settings)
        head = head_of(settings, model)
    except InputError as error:
        return str(error)
    if head is None or not isinstance(dict(model.named_modules()).get(head), nn.Linear):
        return "its head is no nn.Linear, --head NAME"
    return ""


def pretrained(settings: Settings, classes: Any, number: int, iterations: int = 1000) -> nn.Module:
    """The run's network as an ordinary classifier of so many classes has learned it, with a head of zeros: the
    classifier's own head means nothing under new labels.
    """
    model = build_model(settings)
    name = head_of(settings, model)
    assert name is not None  # see `not_pretrained`
    owner_name, _, last = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    head = getattr(owner, last)
    if foreign_model(settings):
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        setattr(owner, last, nn.Linear(head.in_features, number).to(head.weight))
    pretrain(model, classes, iterations=iterations, batch_size=sizing.BATCH, seed=settings.seed)
    setattr(owner, last, head)
    return model
