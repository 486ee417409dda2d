"""The baselines of a run, on the same unseen tasks: the same network without meta-learning, and none at all."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fomaml.app import sizing
from fomaml.app.agenda import Noted
from fomaml.app.build import Data, build_model, judged_by
from fomaml.app.named import foreign_model
from fomaml.app.networks import head_of
from fomaml.app.scores import headline, metrics_of
from fomaml.app.settings import Settings
from fomaml.baselines import (
    fine_tune,
    fit_estimator,
    nearest_centroid,
    pooled,
    pretrain,
    tune_estimator,
    unadapted,
)
from fomaml.errors import InputError
from fomaml.group_episodes import GroupEpisodes
from fomaml.metrics import METRICS, Metric, OfModel

# label, scores by metric, what is told of it in JSON
Rival = tuple[str, dict[str, Tensor], dict[str, Any]]
Note = Callable[[float], None]
POOLED_ROWS = 1000  # that estimators are fitted on beside the support set
ESTIMATORS = {"nearest": "nearest neighbours", "ridge": "ridge", "forest": "random forest"}


def has_baselines(settings: Settings, data: Data) -> bool:
    """Whether there is something to compare a run with: functions have neither classes nor rows."""
    return settings.baselines and (data.own_classes is not None or data.facts is not None)


def baselines(
    settings: Settings, data: Data, say: Callable[[str], None], note: Note = lambda cost: None
) -> Iterator[Rival]:
    """Each baseline on the test tasks, with its settings tuned by the first metric: of groups of rows on validation
    tasks, where there are some, else on training classes or tasks.
    """
    if data.facts is not None:
        yield from _of_groups(settings, data, say, note)
    elif data.own_classes is not None:
        yield from _of_classes(settings, data, say, note)


class _Tuning:
    """How the baselines of a run are tuned and tested."""

    def __init__(self, settings: Settings, data: Data, note: Note):
        self.settings, self.sizes = settings, sizing.of_baselines(settings)
        self.metrics = metrics_of(settings)
        self.plain: Any = data.tuning  # that count for nothing
        if data.facts is not None and data.validation is not None:
            self.plain = data.validation
        self.test: Any = data.test
        self.costs = (
            sizing.tuning(settings, self.sizes), sizing.adaptation(settings, max(self.sizes.at_steps)),
        )  # fmt: skip
        self.noted = Noted(self.plain, lambda tasks: note(tasks * self.costs[0]))
        self.noted_test = Noted(self.test, lambda tasks: note(tasks * self.costs[1]))
        fewer = self.sizes.tasks < settings.test_tasks
        self.few = f", on {self.sizes.tasks} tasks" if fewer else ""

    def fine_tuned(self, model: Any, **choices: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A network that is fine-tuned on each support set: its scores by metric, and what it was tuned to."""
        first, *others = self.metrics
        sizes = self.sizes
        counts: dict[str, Any] = {"tasks": sizes.tasks, "statistics": self.settings.statistics, **choices}
        counts |= judged_by(self.settings)
        best = fine_tune(
            model, self.noted, self.noted_test, **counts, tuning_tasks=sizes.tuning_tasks,
            inner_lrs=sizing.INNER_LRS, at_steps=sizes.at_steps, metric=first,
        )  # fmt: skip
        scores = {first.name: best.scores}
        again = counts | {"tuning_tasks": 1, "inner_lrs": (best.inner_lr,), "at_steps": (best.steps,)}
        for metric in others:
            scores[metric.name] = fine_tune(model, self.plain, self.test, **again, metric=metric).scores
        return scores, {"inner_lr": best.inner_lr, "steps": best.steps}

    def as_it_is(self, model: nn.Module) -> dict[str, Tensor]:
        """The scores of a network that does not adapt."""
        counts: dict[str, Any] = {"tasks": self.sizes.tasks, "statistics": self.settings.statistics}
        counts |= judged_by(self.settings)
        return {metric.name: unadapted(model, self.test, **counts, metric=metric) for metric in self.metrics}

    def estimated(self, name: str, pool: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """An estimator of scikit-learn: its scores by metric, and what it was tuned to."""
        criterion = judged_by(self.settings)["criterion"]
        first, *others = self.metrics
        counts: dict[str, Any] = {"pool": pool, "tasks": self.sizes.tasks, "criterion": criterion}
        chosen = tune_estimator(
            name, self.plain, self.test, **counts, tuning_tasks=min(self.sizes.tuning_tasks, sizing.FEW_TASKS),
            trials=len(sizing.INNER_LRS) * len(self.sizes.at_steps), seed=self.settings.seed, metric=first,
        )  # fmt: skip
        scores = {first.name: chosen.scores}
        options = dict(chosen.settings)
        share = options.pop("share", 1.0)
        for metric in others:
            scores[metric.name] = fit_estimator(
                name, self.test, **counts, share=share, options=options, metric=metric
            )
        return scores, {"settings": chosen.settings, "trials": len(chosen.trials)}


def _of_classes(settings: Settings, data: Data, say: Callable[[str], None], note: Note) -> Iterator[Rival]:
    """The baselines of classes that are numbered anew in each task."""
    how = _Tuning(settings, data, note)
    say("baseline: the same network from a random start")
    yield (
        f"random start, support set only{how.few}",
        *how.fine_tuned(lambda n: build_model(settings, 1000 + n)),
    )
    learned: dict[str, Any] = {"pretrained classifier, fine-tuned": data.own_classes}
    if settings.augment != "none":
        learned["pretrained on augmented, fine-tuned"] = data.classes
    if why := not_pretrained(settings):
        say(f"baseline: no pretrained classifier: {why}")
        learned = {}
    for label, known in learned.items():
        say(f"baseline: the same network pretrained as a classifier of {len(known)} classes")
        model = pretrained(settings, _noted(known, note), len(known), how.sizes.pretraining)
        yield f"{label}{how.few}", *how.fine_tuned(model)
    known = [metric for metric in metrics_of(settings) if METRICS.get(metric.name) and metric.name != "loss"]
    if known and known[0].name == headline(settings).name:
        centroids = {
            metric.name: nearest_centroid(data.test, tasks=settings.test_tasks, metric=metric)
            for metric in known
        }
        yield "nearest centroid of the pixels", centroids, {}


def _of_groups(settings: Settings, data: Data, say: Callable[[str], None], note: Note) -> Iterator[Rival]:
    """The baselines of groups of rows; where their classes or targets are the same in all tasks also what is trained on
    all training tasks pooled.
    """
    how = _Tuning(settings, data, note)
    assert isinstance(data.train, GroupEpisodes)
    source, anew = data.train.source, data.train.draws_classes
    if not anew:
        say("baseline: the same network trained on all training tasks pooled")
        model = build_model(settings)
        options: dict[str, Any] = {"batch_size": sizing.BATCH, "seed": settings.seed, **judged_by(settings)}
        pretrain(model, _noted(source, note), iterations=how.sizes.pretraining, **options)
        yield f"all tasks pooled, not adapted{how.few}", how.as_it_is(model), {}
        yield f"all tasks pooled, fine-tuned{how.few}", *how.fine_tuned(model)
        head = head_of(settings, model)
        if head is not None:
            label = f"all tasks pooled, head fine-tuned{how.few}"
            yield label, *how.fine_tuned(model, adapted=head if "*" in head else f"{head}.*")
    elif why := not_pretrained(settings):
        say(f"baseline: no pretrained classifier: {why}")
    else:
        number = len(source.classes or ())
        say(f"baseline: the same network pretrained as a classifier of {number} classes")
        model = pretrained(settings, _noted(source, note), number, how.sizes.pretraining)
        yield f"pretrained classifier, fine-tuned{how.few}", *how.fine_tuned(model)
    say("baseline: the same network from a random start")
    yield (
        f"random start, support set only{how.few}",
        *how.fine_tuned(lambda n: build_model(settings, 1000 + n)),
    )
    if why := _not_estimated(settings, how.metrics):
        say(f"baseline: nothing without a network: {why}")
        return
    pool = None if anew else pooled(source, rows=POOLED_ROWS, seed=settings.seed)
    for name, label in ESTIMATORS.items():
        what = "support set" if anew else "support set and pooled rows"
        say(f"baseline: {label} of scikit-learn")
        yield f"{label}, {what}{how.few}", *how.estimated(name, pool)
    if settings.kind == "regression":
        yield f"ridge, support set only{how.few}", *how.estimated("ridge", None)


def _noted(source: Any, note: Note) -> Any:
    """A source whose drawing tells what was learned from."""
    return Noted(source, lambda examples: note(examples * sizing.PASSES))


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
