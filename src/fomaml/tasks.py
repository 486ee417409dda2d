"""The two shapes everything else is written in: labelled examples, and a task made of two such sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fomaml.errors import InputError


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


def as_batch(tasks: Any, model: nn.Module) -> Task:
    """A batch of tasks, of plain pairs ((inputs, targets), (inputs, targets)) too, of numpy arrays, or of a list of
    single tasks of equal shapes. What it holds has been looked at.

    model: floating numpy arrays take its dtype and device.

    Raises:
        InputError: something else, a single task, or no tasks, no examples or unequal numbers of them.
    """
    if (
        isinstance(tasks, list | tuple)
        and not isinstance(tasks, Task)
        and tasks
        and all(map(_is_task, tasks))
    ):
        singles = [
            (as_examples(support, model), as_examples(query, model, "query")) for support, query in tasks
        ]
        tasks = stack([Task(*single) for single in singles])
    support, query = _pair(tasks, "a batch of tasks is a pair of support and query sets")
    found = Task(as_examples(support, model, "support", True), as_examples(query, model, "query", True))
    if found.support.targets.shape[0] != found.query.targets.shape[0]:
        numbers = [part.targets.shape[0] for part in found]
        raise InputError(f"{numbers[0]} support sets and {numbers[1]} query sets: a task has one of each")
    return found


def as_examples(examples: Any, model: nn.Module, name: str = "support", batch: bool = False) -> Examples:
    """Labelled examples, of a plain pair and of numpy arrays too; with `batch` those of a batch of tasks.

    name: of the set, for messages.

    Raises: as `as_batch`.
    """
    inputs, targets = _pair(examples, f"a {name} set is a pair of inputs and targets")
    inputs, targets = _as_tensor(inputs, model), _as_tensor(targets, model)
    if targets.dtype in (torch.int8, torch.int16, torch.int32):
        targets = targets.long()  # what torch's losses take for labels
    axes = 1 + int(batch)
    if min(inputs.dim(), targets.dim()) < axes:
        wanted = "(tasks, examples, ...)" if batch else "(examples, ...)"
        cure = "; of one task, task.map(lambda tensor: tensor[None])" if batch else ""
        raise InputError(
            f"{name} inputs and targets have shape {wanted}, got {tuple(inputs.shape)} and {tuple(targets.shape)}{cure}"
        )
    if inputs.shape[:axes] != targets.shape[:axes]:
        what = "tasks and examples" if batch else "examples"
        raise InputError(
            f"{name} inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} differ in their numbers of {what}"
        )
    if 0 in targets.shape[:axes]:
        what = "tasks" if batch and not targets.shape[0] else "examples"
        raise InputError(f"there are no {what}: {name} inputs of shape {tuple(inputs.shape)}")
    return Examples(inputs, targets)


def _is_task(given: Any) -> bool:
    """Whether it is a pair of pairs, as a support and a query set are."""
    return (
        isinstance(given, tuple | list)
        and len(given) == 2
        and all(isinstance(part, tuple | list) and len(part) == 2 for part in given)
    )


def _pair(given: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        number = f" of {len(given)}" if isinstance(given, tuple | list) else ""
        raise InputError(f"{what}, got a {type(given).__name__}{number}; see fomaml.Task and fomaml.Examples")
    return given[0], given[1]


def _as_tensor(values: Any, model: nn.Module) -> Tensor:
    if isinstance(values, np.ndarray | np.generic):
        own = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.to(own.device, own.dtype if tensor.is_floating_point() else None)
    if not isinstance(values, Tensor):
        raise InputError(f"inputs and targets are tensors or numpy arrays, got a {type(values).__name__}")
    return values.clone() if values.is_inference() else values  # which autograd does not take


def check_finite_tasks(tasks: Task, start: int | None = None) -> None:
    """Raise `InputError` where a batch of tasks holds numbers that are not finite.

    start: the number of its first task, where the message is to name them.
    """
    for name, part in zip(Task._fields, tasks):
        for kind, tensor in zip(Examples._fields, part):
            if tensor.isfinite().all():
                continue
            if start is None:
                bad = next(index for index, own in enumerate(tensor) if not own.isfinite().all())
                which = f"task {bad} of a batch"
            else:
                which = f"the tasks {start} to {start + count(tasks) - 1}"
            raise InputError(f"the {name} {kind} of {which} hold numbers that are not finite")


def stack(tasks: list[Task]) -> Task:
    """A batch of single tasks of equal shapes.

    Raises:
        InputError: unequal shapes.
    """
    parts = [[tensor for part in task for tensor in part] for task in tasks]
    for tensors in zip(*parts):
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise InputError(
                f"the tasks of a batch have one shape each, got {' and '.join(map(str, sorted(shapes)))}"
            )
    a, b, c, d = (torch.stack(tensors) for tensors in zip(*parts))
    return Task(Examples(a, b), Examples(c, d))


def ways_each(targets: Tensor, ignored: int | None = None) -> list[int]:
    """By task, the number of classes: the largest of its labels and one, at least 1.

    targets: (tasks, examples, ...) labels. ignored: the one that counts for nothing.
    """
    labels = targets.flatten(1).long()
    if ignored is not None:
        labels = labels.masked_fill(labels == ignored, 0)
    return (labels.amax(1) + 1).clamp(min=1).tolist()


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
