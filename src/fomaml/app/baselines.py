"""The baselines of a run, on the same unseen tasks: its network from other starts, and what takes no network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fomaml.app import group_baselines, sizing
from fomaml.app.agenda import Noted
from fomaml.app.build import Data, build_model, judged_by
from fomaml.app.named import foreign_model
from fomaml.app.networks import head_of
from fomaml.app.scores import headline, metrics_of
from fomaml.app.settings import Settings
from fomaml.baselines import fine_tune, nearest_centroid, pool, pretrain
from fomaml.data.groups import GroupSource
from fomaml.data.source import ClassSource
from fomaml.errors import InputError
from fomaml.group_episodes import GroupEpisodes
from fomaml.metrics import METRICS


def has_baselines(settings: Settings, data: Data) -> bool:
    """Whether there is something to compare a run with: functions have no classes."""
    return settings.baselines and (data.own_classes is not None or data.facts is not None)


def baselines(settings: Settings, data: Data, say, note: Callable[[float], None] = lambda cost: None):
    """(label, scores by metric, facts) of each baseline on the test tasks, step size and count tuned on training
    classes by the first metric.
    """
    if not has_baselines(settings, data):
        return
    sizes = sizing.of_baselines(settings)
    counts: dict[str, Any] = {"tasks": sizes.tasks, "tuning_tasks": sizes.tuning_tasks}
    counts |= {"inner_lrs": sizing.INNER_LRS, "at_steps": sizes.at_steps, "statistics": settings.statistics}
    costs = sizing.tuning(settings, sizes), sizing.adaptation(settings, max(sizes.at_steps))
    tuning = Noted(data.tuning, lambda tasks: note(tasks * costs[0]))
    test = Noted(data.test, lambda tasks: note(tasks * costs[1]))
    few = f", on {sizes.tasks} tasks" if sizes.tasks < settings.test_tasks else ""

    def tuned(model: Any) -> tuple[dict[str, Tensor], dict]:
        first, *others = metrics_of(settings)
        best = fine_tune(model, tuning, test, **counts, **judged_by(settings), metric=first)
        scores = {first.name: best.scores}
        again = counts | {"tuning_tasks": 1, "inner_lrs": (best.inner_lr,), "at_steps": (best.steps,)}
        for metric in others:
            own = fine_tune(model, data.tuning, data.test, **again, **judged_by(settings), metric=metric)
            scores[metric.name] = own.scores
        return scores, {"inner_lr": best.inner_lr, "steps": best.steps}

    say("baseline: the same network from a random start")
    yield f"random start, support set only{few}", *tuned(lambda n: build_model(settings, 1000 + n))
    why = not_pretrained(settings)
    if why:
        say(f"baseline: no pretrained network: {why}")
    own_classes, classes = data.own_classes, data.classes
    if own_classes is None or classes is None:
        rows, metrics = cast(GroupEpisodes, data.train).source, metrics_of(settings)
        if not why:
            say("baseline: the same network trained on the rows of all training tasks")
            model = pooled(settings, rows, sizes.pretraining)
            yield from group_baselines.pooled(
                settings, model, data.test, metrics, judged_by(settings), tuned, few
            )
        yield from group_baselines.without_network(settings, rows, data.test, metrics, say)
        return
    learned = {} if why else {"pretrained classifier, fine-tuned": own_classes}
    if settings.augment != "none" and not why:
        learned["pretrained on augmented, fine-tuned"] = classes
    for label, known in learned.items():
        say(f"baseline: the same network pretrained as a classifier of {len(known)} classes")
        seen: Any = Noted(known, lambda examples: note(examples * sizing.PASSES))
        model = pretrained(settings, seen, sizes.pretraining)
        yield f"{label}{few}", *tuned(model)
    known = [metric for metric in metrics_of(settings) if METRICS.get(metric.name) and metric.name != "loss"]
    if known and known[0].name == headline(settings).name:
        centroids = {
            metric.name: nearest_centroid(data.test, tasks=settings.test_tasks, metric=metric)
            for metric in known
        }
        yield "nearest centroid of the pixels", centroids, {}


def not_pretrained(settings: Settings) -> str:
    """Why the run's network cannot be pretrained, in words; "" where it can."""
    if settings.loss is not None or settings.output is not None:
        return "what its outputs are is said by " + ("--loss" if settings.loss is not None else "--output")
    if settings.kind is not None and settings.fixed_classes is not False:
        return ""  # no other head
    try:
        model = build_model(settings)
        head = head_of(settings, model)
    except InputError as error:
        return str(error)
    if head is None or not isinstance(dict(model.named_modules()).get(head), nn.Linear):
        return "its head is no nn.Linear, --head NAME"
    return ""


def pretrained(settings: Settings, classes: ClassSource, iterations: int = 1000) -> nn.Module:
    """The run's network as an ordinary classifier of these classes has learned it, with a head of zeros: the
    classifier's own head means nothing under new labels.
    """
    with _wide_head(settings, len(classes)) as model:
        pretrain(model, classes, iterations=iterations, batch_size=sizing.BATCH, seed=settings.seed)
    return model


def pooled(settings: Settings, source: GroupSource, iterations: int) -> nn.Module:
    """The run's network as the rows of all these tasks have taught it, as if they were of one.

    Where classes are numbered anew in each task, it learns all classes of the source with another head.
    """
    options: dict[str, Any] = {"iterations": iterations, "batch_size": sizing.BATCH, "seed": settings.seed}
    if settings.fixed_classes is not False:
        return pool(build_model(settings), source, **options)
    with _wide_head(settings, len(source.classes or ())) as model:
        pool(model, source, **options)
    return model


@contextlib.contextmanager
def _wide_head(settings: Settings, classes: int) -> Iterator[nn.Module]:
    """The run's network, within the block with a head of so many classes."""
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
        setattr(owner, last, nn.Linear(head.in_features, classes).to(head.weight))
    yield model
    setattr(owner, last, head)
