"""The two shapes everything else is written in: labelled examples, and a task made of two such sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor


class Examples(NamedTuple):
    """Labelled examples, the first axis of both tensors running over the examples.

    inputs: (examples, ...), any dtype the model takes.
    targets: (examples,) int64 for classification, (examples, ...) floating for regression.
    """

    inputs: Tensor
    targets: Tensor


class Task(NamedTuple):
    """One task: adapt on `support`, judge on `query`.

    A batch of tasks is a `Task` whose four tensors have one more leading axis, (tasks, examples, ...).
    """

    support: Examples
    query: Examples

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Task:
        """Move all tensors to `device`; cast the floating ones to `dtype`."""
        return self.map(lambda t: t.to(device, dtype if t.is_floating_point() else None))

    def map(self, function: Callable[[Tensor], Tensor]) -> Task:
        """Apply `function` to each of the four tensors."""
        return Task(*(Examples(*(function(tensor) for tensor in part)) for part in self))


def count(tasks: Task) -> int:
    """How many tasks a batch holds."""
    return tasks.support.targets.shape[0]


def one(tasks: Task, index: int) -> Task:
    """Task number `index` of a batch, without the leading axis."""
    return tasks.map(lambda tensor: tensor[index])


def chunks(tasks: Task, size: int) -> Iterator[Task]:
    """Split a batch into batches of at most `size` tasks, in order."""
    if size >= count(tasks):
        yield tasks
        return
    for start in range(0, count(tasks), size):
        yield tasks.map(itemgetter(slice(start, start + size)))
