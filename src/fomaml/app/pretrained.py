"""The networks of a run that have learned all training tasks, or classes, at once: what its baselines begin from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fomaml.app import sizing
from fomaml.app.agenda import Noted
from fomaml.app.build import Data, judged_by
from fomaml.app.named import foreign_model
from fomaml.app.networks import build_model, head_of
from fomaml.app.settings import Settings
from fomaml.baselines import pretrain
from fomaml.devices import forked_random
from fomaml.episodes import RegressionEpisodes
from fomaml.errors import InputError
from fomaml.group_episodes import GroupEpisodes

Note = Callable[[str, float], None]  # of a kind of work of the agenda, its cost as a part of it begins


class Learned(NamedTuple):
    """A network that has learned all training tasks together. head: the globs of its head, where that means something
    in a new task.
    """

    label: str
    model: nn.Module
    head: str | None = None


def all_learned(
    settings: Settings, data: Data, say: Callable[[str], None], note: Note = lambda kind, cost: None
) -> Iterator[Learned]:
    """The networks that have learned all training tasks, or classes, each trained when it is asked for."""
    iterations = sizing.of_baselines(settings).pretraining
    groups = data.train.source if isinstance(data.train, GroupEpisodes) else None
    if not numbered_anew(data):
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


def numbered_anew(data: Data) -> bool:
    """Whether classes are numbered anew in each task."""
    return data.own_classes is not None or (
        isinstance(data.train, GroupEpisodes) and data.train.draws_classes
    )


def _noted(source: Any, note: Note, settings: Settings) -> Any:
    """A source, or episodes of functions, whose drawing tells what was learned from."""
    each = sizing.PASSES
    if isinstance(source, RegressionEpisodes):  # whole tasks
        each *= settings.train_shots + settings.query_shots
    return Noted(source, lambda number: note("baselines", number * each))


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
    with forked_random():
        torch.manual_seed(settings.seed)
        setattr(owner, last, nn.Linear(head.in_features, number).to(head.weight))
    pretrain(model, classes, iterations=iterations, batch_size=sizing.BATCH, seed=settings.seed)
    setattr(owner, last, head)
    return model
