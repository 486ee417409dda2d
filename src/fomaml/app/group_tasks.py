"""The tasks of a run whose tasks are groups of rows, and the scores of these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomaml.app.grouped import Groups
from fomaml.app.settings import Settings
from fomaml.data.groups import GroupSource
from fomaml.data.scaling import Scaling
from fomaml.errors import InputError
from fomaml.group_episodes import GroupEpisodes
from fomaml.metrics import Metric


def drawn(
    settings: Settings,
    found: Groups,
    training: dict[str, Any],
    testing: dict[str, Any],
    seeds: tuple[int, int, int],
    device: torch.device,
) -> dict[str, Any]:
    """What `Data` is made of. Validation and test take one group after the other, so that all count the same.

    training, testing: shots, query_shots and seed of their tasks. seeds: of tuning, validation and test.

    Raises:
        InputError: groups with too few rows, another number of ways than the data have.
    """
    classes = len(found.test.classes or ())
    if settings.fixed_classes and settings.ways != classes:
        raise InputError(f"a task has the {classes} classes of the data, got --ways {settings.ways}")
    testing = testing | {"query_shots": None if settings.query_all else testing["query_shots"]}
    if settings.kind == "classification" and not settings.fixed_classes:
        training, testing = training | {"ways": settings.train_ways}, testing | {"ways": settings.ways}
    shared: dict[str, Any] = {"gap": settings.gap, "fewer_classes": settings.fewer_classes}
    left_out: dict[str, int] = {}

    def episodes(source: GroupSource, part: str, **facts: Any) -> GroupEpisodes:
        small: Any = "leave out" if settings.skip_small_groups else "refuse"
        try:
            made = GroupEpisodes(source, **facts, **shared, small=small, device=device)
        except InputError as error:
            raise InputError(f"{part}: {error}") from None
        left_out.update(made.left_out)
        return made

    testing["draw"] = settings.draw
    made: dict[str, Any] = {
        "train": episodes(found.train, "training", **training, draw=settings.train_draw),
        "tuning": episodes(found.train, "training", **testing, seed=seeds[0]),
        "test": episodes(found.test, "test", **testing, seed=seeds[2], in_turn=True),
        "validation": found.validation
        and episodes(found.validation, "validation", **testing, seed=seeds[1], in_turn=True),
    }
    origin = found.origin
    if left_out:
        few = ", ".join(f"{name} {rows}" for name, rows in list(left_out.items())[:5])
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        origin += f", left out {len(left_out)} with too few rows ({few}{more})"
    return made | {
        "name": found.name,
        "origin": origin,
        "unvalidated": found.unvalidated,
        "facts": found.facts,
    }


def task_numbers(settings: Settings, test: Any, validation: Any) -> dict[str, Any]:
    """How many tasks to test and to validate on: of groups that make one task each no more than there are groups."""
    if settings.draw != "first" or not settings.query_all:
        return {}
    found: dict[str, Any] = {"test_tasks": min(settings.test_tasks, len(test))}
    if validation is not None:
        found["validation_tasks"] = min(settings.validation_tasks, len(validation))
    return found


def of_units(episodes: Any, scores: Tensor) -> Tensor:
    """The scores of what is independent: the means of groups, of episodes that are groups of rows, else the tasks."""
    by_group = getattr(episodes, "by_group", None)
    return scores if by_group is None else by_group(scores)


def in_own_unit(settings: Settings, metric: Metric) -> Metric:
    """The metric of a run; of rows in the unit of their targets, which are scaled for the network."""
    return metric if settings.facts is None else scaling_of(settings).in_own_unit(metric)


def scaling_of(settings: Settings) -> Scaling:
    """The scaling of a run's rows; none of what is no rows."""
    return Scaling() if settings.facts is None else Scaling.from_dict(settings.facts["scaling"])
