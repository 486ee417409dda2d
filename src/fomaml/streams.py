"""Tasks from any iterable of them, such as a `DataLoader`, for a training in one process from its beginning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fomaml.episodes import TaskSequence
from fomaml.errors import InputError, in_one_line
from fomaml.tasks import Batch, Task, as_batch, as_task, count, count_of, one, together
from fomaml.trees import leaves


class TaskStream:
    """The tasks of an iterable in their order, over and over again; no other order can be had.

    iterable: gives single tasks, by iteration or as a `Dataset` does; or is a `DataLoader` with a batch size, which
        gives batches of them.
    model: see `fomaml.tasks.as_batch`.
    """

    ways = None
    copies = 1

    def __init__(self, iterable: Any, model: nn.Module):
        self._iterable = iterable
        self._model = model
        self._tasks = self._all()
        self._warned = False
        self._held: list[Task] = []
        self._position = 0  # of the first that is held

    def batch(self, start: int, tasks: int) -> Batch:
        """Tasks start … start + tasks - 1; those before `start` are let go. Of unequal shapes a list, else with a
        leading axis (tasks, ...).
        """
        if start < self._position:
            raise InputError(f"the tasks before {self._position} are gone: only Episodes gives them again")
        while self._position + len(self._held) < start + tasks:
            self._held.append(next(self._tasks))
        del self._held[: start - self._position]
        self._position = start
        return together(self._held[:tasks])

    def _all(self) -> Iterator[Task]:
        number = 0
        while True:
            before = number
            for given in self._items():
                for task in self._of(given):
                    yield task
                    number += 1
            if number == before:
                what = f"ended after {number} tasks and cannot begin again" if number else "gives no tasks"
                raise InputError(f"the {type(self._iterable).__name__} of tasks {what}")

    def _items(self) -> Iterator[Any]:
        own = self._iterable
        if _has_items(own):
            yield from (own[index] for index in range(len(own)))
            return
        try:
            yield from own
        except RuntimeError as error:
            if not isinstance(own, DataLoader) or "stack expects each tensor" not in str(error):
                raise
            raise InputError(
                f"the DataLoader cannot stack its tasks ({in_one_line(error)}): give it collate_fn=list"
            ) from error

    def _of(self, given: Any) -> Iterator[Task]:
        if isinstance(self._iterable, DataLoader) and self._iterable.batch_size is not None:
            tasks = self._made(as_batch, given)
            yield from (one(tasks, index) for index in range(count(tasks)))
        else:
            task = one(self._made(lambda task, model: [_task(task, model)], given), 0)
            if not self._warned and _may_be_a_batch(task):
                self._warned = True
                text = f"an item of the {type(self._iterable).__name__} is taken for one task, its first axis for "
                text += f"examples, {count_of(task.support)} of them; of a batch of tasks give the tasks one by one"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            yield task

    def _made(self, make: Callable[[Any, nn.Module], Batch], given: Any) -> Batch:
        try:
            return make(given, self._model)
        except InputError as error:
            name = type(self._iterable).__name__
            raise InputError(
                f"the {name} gives no tasks: {error}. Episodes(ClassSource.from_dataset(…), …) makes tasks of examples"
            ) from error


def _has_items(given: Any) -> bool:
    return isinstance(given, Dataset) and hasattr(given, "__len__")


def _may_be_a_batch(task: Task) -> bool:
    """Whether all tensors could have a leading axis of tasks."""
    if len({count_of(part) for part in task}) > 1:
        return False
    return all(
        all(leaf.dim() > 2 for leaf in leaves(inputs))
        and all(leaf.dim() > 1 for leaf in leaves(targets))
        and len({leaf.shape[:2] for leaf in leaves((inputs, targets))}) == 1
        for inputs, targets in task
    )


def _task(given: Any, model: nn.Module) -> Task:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise InputError(f"a task is a pair of a support and a query set, got a {type(given).__name__}")
    return as_task(given[0], given[1], model)


def as_sequence(episodes: Any, model: nn.Module, start: int = 0) -> TaskSequence:
    """What tasks are taken from: `episodes` itself, or a stream of an iterable.

    Raises:
        InputError: neither, or an iterable where tasks must be found by their index: from a later start on, or in
            several processes, which would all take the same ones.
    """
    if hasattr(episodes, "batch"):
        return episodes
    if not isinstance(episodes, Iterable) and not _has_items(episodes):
        raise InputError(
            f"tasks come from Episodes, or any object with batch(start, tasks), got {_name(episodes)}"
        )
    if start:
        raise InputError(f"an iterable of tasks has no task {start}: to go on from there, use Episodes")
    processes = torch.distributed.get_world_size() if _distributed() else 1
    if processes > 1:
        raise InputError(
            f"{processes} processes would each take the tasks of their own iterable: use Episodes"
        )
    return TaskStream(episodes, model)


def batch_of(episodes: TaskSequence, start: int, tasks: int, model: nn.Module) -> Batch:
    """Tasks start … start + tasks - 1, looked at.

    Raises:
        InputError: what gives no tasks by their index, another number of them, or what is no batch of them.
    """
    check_sequence(episodes)
    batch = as_batch(episodes.batch(start, tasks), model)
    if count(batch) != tasks:
        raise InputError(f"batch({start}, {tasks}) of the tasks gave {count(batch)}, expected {tasks}")
    return batch


def check_sequence(episodes: Any) -> None:
    """Raise `InputError` for what cannot give tasks by their index, such as a `DataLoader`."""
    if not hasattr(episodes, "batch"):
        raise InputError(
            f"tasks are taken by their index here: from Episodes, or any object with batch(start, tasks), got "
            f"{_name(episodes)}, which train alone takes"
        )


def _name(given: Any) -> str:
    return f"a {type(given).__name__}"


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
