"""The two shapes everything else is written in: labelled examples, and a task made of two such sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fomaml import trees
from fomaml.errors import InputError
from fomaml.trees import Tree, leaves, mapped


class Examples(NamedTuple):
    """Labelled examples, the first axis of every tensor running over the examples.

    inputs: (examples, ...), any dtype the model takes; or a dict of such tensors, which goes to the model as keywords,
        or a tuple, which goes to it as positional arguments, nested to any depth.
    targets: (examples,) int64 for classification, (examples, ...) floating for regression; or a nesting of tensors, for
        a criterion or loss that takes one. () for a loss that needs none.
    """

    inputs: Tree
    targets: Tree


class Task(NamedTuple):
    """One task: adapt on `support`, judge on `query`.

    A batch of tasks of one shape is a `Task` whose tensors have one more leading axis, (tasks, examples, ...); a batch
    of tasks of any shapes is a list of them.
    """

    support: Examples
    query: Examples

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Task:
        """Move all tensors to `device`; cast the floating ones to `dtype`."""
        return self.map(lambda t: t.to(device, dtype if t.is_floating_point() else None))

    def map(self, function: Callable[[Tensor], Tensor]) -> Task:
        """Apply `function` to each tensor."""
        return mapped(function, self)


Batch = Task | list[Task]  # a meta-batch: stacked, or one task after the other


def as_batch(tasks: Any, model: nn.Module) -> Batch:
    """A batch of tasks, of plain pairs ((inputs, targets), (inputs, targets)) and of numpy arrays too; a list of
    single tasks, which may differ in their shapes, remains one. What it holds has been looked at.

    model: floating numpy arrays take its dtype and device.

    Raises:
        InputError: something else, a single task, or no tasks, no examples or unequal numbers of them.
    """
    if isinstance(tasks, list | tuple) and not isinstance(tasks, Task):
        if not tasks:
            raise InputError(f"there are no tasks: got an empty {type(tasks).__name__}")
        if all(map(_is_task, tasks)):
            _refuse_ambiguous(tasks)
            return [as_task(support, query, model) for support, query in tasks]
        if any(isinstance(each, Task) for each in tasks):
            other = next(number for number, each in enumerate(tasks) if not _is_task(each))
            raise InputError(
                f"item {other} of a list of tasks is a {type(tasks[other]).__name__}, not a Task"
            )
    support, query = _pair(tasks, "a batch of tasks is a pair of support and query sets")
    found = as_task(support, query, model, batch=True)
    numbers = [count_of(part) for part in found]
    if numbers[0] != numbers[1]:
        raise InputError(f"{numbers[0]} support sets and {numbers[1]} query sets: a task has one of each")
    return found


def as_task(support: Any, query: Any, model: nn.Module, batch: bool = False) -> Task:
    """A task of two sets; see `as_examples`."""
    return Task(as_examples(support, model, "support", batch), as_examples(query, model, "query", batch))


def as_examples(examples: Any, model: nn.Module, name: str = "support", batch: bool = False) -> Examples:
    """Labelled examples, of a plain pair and of numpy arrays too; with `batch` those of a batch of tasks.

    name: of the set, for messages.

    Raises: as `as_batch`.
    """
    if _is_plain(examples, batch):
        return examples
    if isinstance(examples, Task):
        raise InputError(f"a {name} set is a pair of inputs and targets, got a Task: give its .support")
    inputs, targets = _pair(examples, f"a {name} set is a pair of inputs and targets")
    inputs = trees.as_tree(inputs, lambda value, path: _as_tensor(value, model, path), f"{name} inputs")
    targets = trees.as_tree(
        () if targets is None else targets,
        lambda value, path: _as_targets(_as_tensor(value, model, path)),
        f"{name} targets",
    )
    every = [*trees.named(inputs, f"{name} inputs"), *trees.named(targets, f"{name} targets")]
    if not leaves(inputs):
        raise InputError(f"a {name} set has no inputs: got an empty {type(inputs).__name__}")
    if isinstance(inputs, dict) and not all(isinstance(key, str) for key in inputs):
        raise InputError(
            f"the {name} inputs are a dict, whose keys go to the model as keywords; got the keys {[*inputs]}"
        )
    _check_axes(every, name, batch)
    return Examples(inputs, targets)


def _is_plain(examples: Any, batch: bool) -> bool:
    """Whether they are examples already: the usual case, at a fifth of the cost."""
    if type(examples) is not Examples:
        return False
    inputs, targets = examples
    if type(inputs) is not Tensor or type(targets) is not Tensor:
        return False
    axes = 1 + batch
    shape = inputs.shape[:axes]
    return (
        targets.shape[:axes] == shape
        and len(shape) == axes
        and 0 not in shape
        and (targets.dtype == torch.int64 or targets.is_floating_point())
        and not inputs.is_inference()
        and not targets.is_inference()
    )


def _refuse_ambiguous(tasks: Any) -> None:
    """Raise `InputError` for two plain pairs of pairs that may be two tasks, or the sets of a batch of nested ones."""
    if len(tasks) != 2 or any(isinstance(part, Examples | Task) for each in tasks for part in (each, *each)):
        return

    def axes(tree: Any) -> list[tuple]:
        """The first two of each tensor."""
        if isinstance(tree, list | tuple):
            return [own for part in tree for own in axes(part)]
        return [tuple(getattr(tree, "shape", ())[:2])]

    parts = [set(axes(each)) for each in tasks]
    as_one = all(len(own) == 1 and len(next(iter(own))) == 2 for own in parts)
    if as_one and len({next(iter(own))[0] for own in parts}) == 1:
        raise InputError(
            "two pairs of pairs may be two tasks, or a batch of tasks whose inputs and targets are pairs: make them "
            "fomaml.Task and fomaml.Examples, which say which"
        )


def _check_axes(every: list[tuple[str, Tensor]], name: str, batch: bool) -> None:
    """Raise `InputError` where tensors lack the axes that all of them share, or differ there.

    every: the tensors of a set, with their names. name, batch: see `as_examples`.
    """
    axes = 1 + int(batch)
    shapes = [tuple(tensor.shape) for _, tensor in every]
    plain = len(every) == 2 and [path for path, _ in every] == [f"{name} inputs", f"{name} targets"]
    if min(map(len, shapes)) < axes:
        wanted = "(tasks, examples, ...)" if batch else "(examples, ...)"
        cure = "; of one task, task.map(lambda tensor: tensor[None])" if batch else ""
        if plain:
            raise InputError(
                f"{name} inputs and targets have shape {wanted}, got {shapes[0]} and {shapes[1]}{cure}"
            )
        path, shape = next((path, shape) for (path, _), shape in zip(every, shapes) if len(shape) < axes)
        raise InputError(f"{path} have shape {wanted}, got {shape}{cure}")
    first = shapes[0][:axes]
    other = next((number for number, shape in enumerate(shapes) if shape[:axes] != first), None)
    if other is not None:
        what = "tasks and examples" if batch else "examples"
        second = "targets" if plain else every[other][0]
        raise InputError(
            f"{every[0][0]} {shapes[0]} and {second} {shapes[other]} differ in their numbers of {what}"
        )
    if 0 in first:
        what = "tasks" if batch and not first[0] else "examples"
        raise InputError(f"there are no {what}: {every[0][0]} of shape {shapes[0]}")


def _is_task(given: Any) -> bool:
    """Whether it is a pair of pairs, as a support and a query set are."""
    return (
        isinstance(given, tuple | list)
        and not isinstance(given, Examples)
        and len(given) == 2
        and all(isinstance(part, tuple | list) and len(part) == 2 for part in given)
    )


def _pair(given: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        number = f" of {len(given)}" if isinstance(given, tuple | list) else ""
        raise InputError(f"{what}, got a {type(given).__name__}{number}; see fomaml.Task and fomaml.Examples")
    return given[0], given[1]


def _as_tensor(values: Any, model: nn.Module, name: str) -> Tensor:
    if isinstance(values, np.ndarray | np.generic):
        own = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        if not (np.issubdtype(values.dtype, np.number) or values.dtype == np.bool_):
            raise InputError(f"{name} are a numpy array of {values.dtype}, expected numbers")
        tensor = torch.from_numpy(np.ascontiguousarray(values, values.dtype.newbyteorder("=")))
        return tensor.to(own.device, own.dtype if tensor.is_floating_point() else None)
    if not isinstance(values, Tensor):
        where = f"; {name} is one" if "[" in name else ""
        raise InputError(
            f"inputs and targets are tensors or numpy arrays, got a {type(values).__name__}{where}"
        )
    return values.clone() if values.is_inference() else values  # which autograd does not take


def _as_targets(tensor: Tensor) -> Tensor:
    """Labels in the dtype that torch's losses take."""
    return tensor.long() if tensor.dtype in (torch.int8, torch.int16, torch.int32) else tensor


def check_finite_tasks(tasks: Batch, start: int | None = None) -> None:
    """Raise `InputError` where a batch of tasks holds numbers that are not finite.

    start: the number of its first task, where the message is to name them.
    """
    if not isinstance(tasks, Task):
        for number, task in enumerate(tasks):
            check_finite_tasks(task.map(lambda tensor: tensor[None]), start and start + number)
        return
    for name, part in zip(Task._fields, tasks):
        for kind, tree in zip(Examples._fields, part):
            for path, tensor in trees.named(tree, kind):
                if tensor.isfinite().all():
                    continue
                if start is None:
                    bad = next(index for index, own in enumerate(tensor) if not own.isfinite().all())
                    which = f"task {bad} of a batch"
                else:
                    which = f"the tasks {start} to {start + count(tasks) - 1}"
                raise InputError(f"the {name} {path} of {which} hold numbers that are not finite")


def stack(tasks: Sequence[Task]) -> Task:
    """A batch of single tasks of equal shapes.

    Raises:
        InputError: unequal shapes.
    """
    if len({trees.structure(task) for task in tasks}) > 1:
        raise InputError("the tasks of a batch have one shape each, and these are nested in different ways")
    for tensors in zip(*map(leaves, tasks)):
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise InputError(
                f"the tasks of a batch have one shape each, got {' and '.join(map(str, sorted(shapes)))}"
            )
    return trees.joined(list(tasks), torch.stack)


def together(tasks: list[Task]) -> Batch:
    """Single tasks as a batch: stacked where they have one shape and dtype, else as they are."""
    return stack(tasks) if len(set(map(shape_of, tasks))) == 1 else tasks


def shape_of(tasks: Task) -> tuple:
    """What tasks must have in common to be stacked: the nesting, shapes, dtypes and devices, hashable."""
    shapes = tuple([(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors_of(tasks)])
    return shapes if _is_usual(tasks) else (trees.structure(tasks), shapes)


def tensors_of(tasks: Task) -> list[Tensor]:
    """All of them, in order."""
    # without a walk, which would be a part of a small meta-gradient
    return [*tasks[0], *tasks[1]] if _is_usual(tasks) else leaves(tasks)


def _is_usual(tasks: Task) -> bool:
    """Whether inputs and targets are one tensor each."""
    (a, b), (c, d) = tasks
    return type(a) is Tensor and type(b) is Tensor and type(c) is Tensor and type(d) is Tensor


def ways_each(targets: Tensor, ignored: int | None = None) -> list[int]:
    """By task, the number of classes: the largest of its labels and one, at least 1.

    targets: (tasks, examples, ...) labels. ignored: the one that counts for nothing.
    """
    labels = targets.flatten(1).long()
    if ignored is not None:
        labels = labels.masked_fill(labels == ignored, 0)
    return (labels.amax(1) + 1).clamp(min=1).tolist()


def are_labels(targets: Tree) -> bool:
    """Whether they are one tensor of whole numbers."""
    return isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()


def first(tree: Tree) -> Tensor:
    """Its first tensor, whose device and leading axes are those of all."""
    return tree if isinstance(tree, Tensor) else leaves(tree)[0]


def count_of(examples: Examples) -> int:
    """How long the first axis is: the number of examples, or of tasks."""
    return first(examples.inputs).shape[0]


def count(tasks: Batch) -> int:
    """How many tasks a batch holds."""
    return count_of(tasks.support) if isinstance(tasks, Task) else len(tasks)


def device_of(tasks: Batch) -> torch.device:
    """Where its tensors are."""
    return first(tasks.support.inputs if isinstance(tasks, Task) else tasks[0].support.inputs).device


def one(tasks: Batch, index: int) -> Task:
    """Task number `index` of a batch, without the leading axis."""
    return tasks.map(lambda tensor: tensor[index]) if isinstance(tasks, Task) else tasks[index]


def singles(tasks: Batch) -> Iterator[Task]:
    """The tasks of a batch one by one, each a batch of one."""
    if isinstance(tasks, Task):
        yield from chunks(tasks, 1)
    else:
        yield from (task.map(lambda tensor: tensor[None]) for task in tasks)


def chunks(tasks: Task, size: int) -> Iterator[Task]:
    """Split a batch into batches of at most `size` tasks, in order."""
    if size >= count(tasks):
        yield tasks
        return
    for start in range(0, count(tasks), size):
        yield tasks.map(itemgetter(slice(start, start + size)))
