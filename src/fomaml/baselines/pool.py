"""The examples of all training tasks together, as if they were of one task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn

from fomaml.data.groups import GroupSource
from fomaml.data.source import ClassSource
from fomaml.draws import generator
from fomaml.episodes import TaskSequence
from fomaml.errors import InputError, positive
from fomaml.streams import batch_of
from fomaml.tasks import Examples, Task, count_of, singles
from fomaml.trees import joined, leaves, mapped, structure

Training: TypeAlias = ClassSource | GroupSource | TaskSequence
LOOKED_AT = nn.Identity()  # of whose dtype and device floating arrays of tasks become tensors


class Pool(NamedTuple):
    """Labelled examples of many tasks.

    groups: the name of the task that each is of, where tasks have names; else None.
    """

    examples: Examples
    groups: np.ndarray | None = None


def pooled(source: GroupSource | TaskSequence, *, rows: int = 2000, seed: int = 0) -> Pool:
    """At most so many examples of all training tasks, to fit an estimator on.

    source: rows of groups, of which random ones are taken, the same for the same seed; or a sequence of tasks, of which
        the first ones are taken whole, as many as there is room for, and one at least.

    Raises:
        InputError: classes that are numbered anew in each task, so that labels of several tasks do not go together.
    """
    rows = positive("rows", rows, integer=True)
    if isinstance(source, ClassSource) or is_renumbered(source):
        raise InputError(
            "the classes are numbered anew in each task: pooled labels would mean nothing, leave the pool out"
        )
    if not isinstance(source, GroupSource):
        return Pool(_of_first_tasks(source, rows))
    names = np.repeat(np.array(source.names, dtype=object), source.counts)
    positions = np.arange(len(names))
    if len(positions) > rows:
        positions = np.sort(generator(seed, 0).choice(positions, rows, replace=False))
    return Pool(Examples(*source.take(positions)), names[positions])


def is_renumbered(episodes: Any) -> bool:
    """Whether tasks have classes of their own."""
    return isinstance(getattr(episodes, "source", None), ClassSource) or getattr(
        episodes, "draws_classes", False
    )


def _of_first_tasks(episodes: TaskSequence, rows: int) -> Examples:
    parts: list[Examples] = []
    number = 0
    while True:
        [task] = tasks_of(episodes, number, 1, LOOKED_AT)
        left = rows - sum(map(count_of, parts))
        size = sum(map(count_of, task))
        if parts and size > left:
            break
        parts += task
        number += 1
    if not fit_together(parts):
        raise InputError("the examples of the tasks differ in shape, and cannot be pooled")
    return joined(parts)


def tasks_of(episodes: TaskSequence, start: int, number: int, model: nn.Module) -> list[Task]:
    """Tasks one by one, without a leading axis."""
    batch = batch_of(episodes, start, number, model)
    return [task.map(lambda tensor: tensor[0]) for task in singles(batch)]


def fit_together(parts: list[Examples]) -> bool:
    """Whether their tensors differ in the number of examples alone."""
    kinds = {(structure(part), *((t.shape[1:], t.dtype) for t in leaves(part))) for part in parts}
    return len(kinds) == 1


def batches_of(
    source: Training, batch_size: int, seed: int, model: nn.Module
) -> Callable[[int], list[Examples]]:
    """Iteration, in order → a mini-batch of pooled examples, on the device of the model; in parts if it is of tasks.

    Of rows each batch is of random ones; of a sequence of tasks it is of whole tasks, the next ones each time.
    """
    device = next((parameter.device for parameter in model.parameters()), None)
    random = torch.Generator().manual_seed(seed)
    own: Any = source

    def moved(examples: Examples) -> Examples:
        return mapped(lambda tensor: tensor.to(device), examples)

    if hasattr(own, "take") and hasattr(own, "labels"):  # of classes
        labels = own.labels()

        def of_classes(iteration: int) -> list[Examples]:
            rows = torch.randint(len(labels), (batch_size,), generator=random)
            return [moved(Examples(own.take(rows), labels[rows]))]

        return of_classes
    if hasattr(own, "take") and hasattr(own, "positions"):  # of groups

        def of_groups(iteration: int) -> list[Examples]:
            rows = torch.randint(len(own.rows), (batch_size,), generator=random)
            return [moved(Examples(*own.take(rows.numpy())))]

        return of_groups
    [task] = tasks_of(own, 0, 1, model)
    number = max(1, round(batch_size / sum(map(count_of, task))))

    def of_tasks(iteration: int) -> list[Examples]:
        found = tasks_of(own, iteration * number, number, model)
        return [moved(part) for task in found for part in task]

    return of_tasks
