"""What the engines share: the result, and the walk over a meta-batch in chunks of tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import itemgetter
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fomaml.choices import Statistics
from fomaml.engines import _torch
from fomaml.errors import InputError
from fomaml.learning.learner import MetaLearner
from fomaml.learning.problem import Problem
from fomaml.metrics import ignored_label
from fomaml.tasks import Task, count, ways_each


class Engine(Protocol):
    """A way to compute a chunk of a meta-batch: it makes the inner problem of a batch of tasks.

    evaluating, ways: see `Problem`.
    Raises `InputError` for a learner that it does not take.
    """

    def __call__(
        self, learner: MetaLearner, tasks: Task, *, evaluating: bool = False, ways: int | None = None
    ) -> Problem: ...


class MetaGradient(NamedTuple):
    """gradients: by meta-parameter name, the mean over tasks; zeros where nothing depends on it.

    query_losses: (tasks,) at φ_K. support_losses: (tasks, steps), each at the start of its step.
    query_outputs: (tasks, query examples, ...) at φ_K; -inf for classes that a task does not have, where a start makes
    heads of several numbers of ways. engine: the engine that computed it.
    """

    gradients: dict[str, Tensor]
    query_losses: Tensor
    support_losses: Tensor
    query_outputs: Tensor
    engine: str

    def apply_to(self, learner: MetaLearner) -> None:
        """Set `.grad` of the learner's meta-parameters, for any `torch.optim` optimiser to step on."""
        for name, parameter in learner.meta_parameters().items():
            parameter.grad = self.gradients[name]


class Found(NamedTuple):
    """What a chunk of a meta-batch contributes. gradients: by meta-parameter name, one after the other; query_losses
    (tasks,), support_losses (tasks, steps), query_outputs (tasks, ...).
    """

    gradients: list[Tensor]
    query_losses: Tensor
    support_losses: Tensor
    query_outputs: Tensor


def differentiate(learner: MetaLearner, problem: Problem, tasks: int = 1) -> Found:
    """What one problem contributes: the gradients summed over its tasks, and divided by a number.

    tasks: the number, which is in the graph of what is compiled, where it costs nothing. Else the mean is taken at the
        end: a backward pass that is not linear, such as one that clips, sees the gradient that a task has alone.
    """
    parameters = learner.meta_parameters()
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            raise InputError(
                f"the parameter {name} no longer requires a gradient: make a new learner, or one with frozen={name!r}"
            )
    outcome = learner.objective(problem)
    gradients = torch.autograd.grad(
        outcome.scalar / tasks if tasks > 1 else outcome.scalar,
        list(parameters.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    _, losses, outputs, support_losses = outcome
    if problem.stacked:
        return Found(list(gradients), losses, support_losses.T, outputs)
    return Found(list(gradients), losses[None], support_losses[None], outputs[None])


def accumulate(names: Sequence[str], found: Iterable[Found], engine: str, tasks: int) -> MetaGradient:
    """Put the chunks of a meta-batch together, one in memory at a time.

    names: of the gradients. tasks: what the sums are divided by; 1 where they are means already.
    """
    found = iter(found)
    gradients, *seen = next(found)
    rest = []
    for chunk in found:
        # not in place: autograd may hand two parameters the same tensor
        gradients = _torch.add(gradients, chunk.gradients)
        rest.append(chunk[1:])
    losses, support_losses, outputs = map(torch.cat, zip(seen, *rest)) if rest else seen
    gradients = _torch.divide(gradients, tasks) if tasks > 1 else _apart(gradients)
    return MetaGradient(dict(zip(names, gradients)), losses, support_losses, outputs, engine)


def _apart(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Each in memory of its own: autograd may hand two parameters one tensor, and whoever scales both would scale it
    twice.
    """
    known: set[int] = set()
    found = []
    for gradient in gradients:
        place = 0 if gradient.is_sparse else gradient.data_ptr()
        if place and (place in known or (not gradient.is_contiguous() and 0 in gradient.stride())):
            gradient = gradient.clone(memory_format=torch.contiguous_format)
        known.add(place)
        found.append(gradient)
    return found


def by_ways(learner: MetaLearner, tasks: Task) -> list[tuple[list[int], Task, int | None]]:
    """(which tasks, these, their number of ways), so that a start makes each task the head that it would have alone.

    One group with None where no start asks for the number of ways, or it is not known by labels.
    """
    rows = list(range(count(tasks)))
    targets = tasks.support.targets
    if learner.start is None or targets.is_floating_point():
        return [(rows, tasks, None)]
    each = ways_each(targets, ignored_label(learner.criterion))
    ways = sorted(set(each))
    if len(ways) == 1:
        return [(rows, tasks, ways[0])]
    groups = [[row for row in rows if each[row] == number] for number in ways]
    return [(own, tasks.map(itemgetter(own)), number) for own, number in zip(groups, ways)]


def in_order(groups: Sequence[Sequence[int]], tensors: Sequence[Tensor]) -> Tensor:
    """What was computed of groups of tasks, (tasks, ...) each, in the order of all tasks.

    Narrower outputs are filled up with -inf.
    """
    if len(tensors) == 1:
        return tensors[0]
    if tensors[0].dim() > 2:
        widest = max(tensor.shape[2] for tensor in tensors)
        after = [0, 0] * (tensors[0].dim() - 3)
        tensors = [F.pad(t, [*after, 0, widest - t.shape[2]], value=-math.inf) for t in tensors]
    rows = torch.tensor([row for group in groups for row in group], device=tensors[0].device)
    return torch.cat(list(tensors))[rows.argsort()]


def joined(groups: Sequence[Sequence[int]], parts: Sequence[MetaGradient]) -> MetaGradient:
    """The meta-gradient of all tasks out of those of groups of them."""
    if len(parts) == 1:
        return parts[0]
    gradients = list(parts[0].gradients.values())
    for part in parts[1:]:
        gradients = list(_torch.add(gradients, list(part.gradients.values())))
    return MetaGradient(
        dict(zip(parts[0].gradients, gradients)),
        in_order(groups, [part.query_losses for part in parts]),
        in_order(groups, [part.support_losses for part in parts]),
        in_order(groups, [part.query_outputs for part in parts]),
        parts[0].engine,
    )


def out_of_memory(error: Exception) -> bool:
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def first_line(error: Exception) -> str:
    """Of an error's message, or the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def curves(
    problems: Iterable[Problem], points: Sequence[tuple[int, Statistics]]
) -> list[tuple[Tensor, Tensor]]:
    """For each number of steps, ascending, and statistics: query losses (tasks,) and outputs
    (tasks, examples, ...), no graph kept.
    """
    parts: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in points]
    for problem in problems:
        path = problem.path(first_order=True)
        adapted, done = problem.start, 0
        for part, (steps, statistics) in zip(parts, points):
            for adapted, _ in islice(path, steps - done):
                pass
            done = steps
            # the model may write into its buffers, and a look at the query set must not change later steps
            buffers = {name: buffer.clone() for name, buffer in problem.buffers.items()}
            with torch.no_grad():
                losses, outputs = problem.query(adapted, statistics, buffers=buffers)
            for of_all, of_these in zip(part, (losses, outputs)):
                of_all.append(of_these if problem.stacked else of_these[None])
    return [(torch.cat(losses), torch.cat(outputs)) for losses, outputs in parts]
