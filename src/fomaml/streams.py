"""Tasks from any iterable of them, such as a `DataLoader`, for a training in one process from its beginning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from fomaml.episodes import TaskSequence
from fomaml.errors import InputError
from fomaml.tasks import Task, as_batch, as_examples, count, one, stack


class TaskStream:
    """The tasks of an iterable in their order, over and over again; no other order can be had.

    iterable: gives single tasks, or is a `DataLoader` with a batch size, which gives batches of them.
    model: see `fomaml.tasks.as_batch`.
    """

    ways = None
    copies = 1

    def __init__(self, iterable: Iterable, model: nn.Module):
        self._iterable = iterable
        self._model = model
        self._tasks = self._all()
        self._held: list[Task] = []
        self._position = 0  # of the first that is held

    def batch(self, start: int, tasks: int) -> Task:
        """Tasks start … start + tasks - 1, with a leading axis (tasks, ...); those before `start` are let go."""
        if start < self._position:
            raise InputError(f"the tasks before {self._position} are gone: only Episodes gives them again")
        while self._position + len(self._held) < start + tasks:
            self._held.append(next(self._tasks))
        del self._held[: start - self._position]
        self._position = start
        return stack(self._held[:tasks])

    def _all(self) -> Iterator[Task]:
        number = 0
        while True:
            before = number
            for given in self._iterable:
                for task in self._of(given):
                    yield task
                    number += 1
            if number == before:
                what = f"ended after {number} tasks and cannot begin again" if number else "gives no tasks"
                raise InputError(f"the {type(self._iterable).__name__} of tasks {what}")

    def _of(self, given: Any) -> Iterator[Task]:
        if isinstance(self._iterable, DataLoader) and self._iterable.batch_size is not None:
            tasks = as_batch(given, self._model)
            yield from (one(tasks, index) for index in range(count(tasks)))
        elif isinstance(given, tuple | list) and len(given) == 2:
            support, query = given
            yield Task(as_examples(support, self._model), as_examples(query, self._model, "query"))
        else:
            raise InputError(
                f"an iterable of tasks gives pairs of a support and a query set, got a {type(given).__name__}"
            )


def as_sequence(episodes: Any, model: nn.Module, start: int = 0) -> TaskSequence:
    """What tasks are taken from: `episodes` itself, or a stream of an iterable.

    Raises:
        InputError: neither, or an iterable where tasks must be found by their index: from a later start on, or in
            several processes, which would all take the same ones.
    """
    if hasattr(episodes, "batch"):
        return episodes
    if not isinstance(episodes, Iterable):
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
