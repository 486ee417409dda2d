"""What the engines share: the result, and the walk over a meta-batch in chunks of tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fomaml.choices import Statistics, check_choice
from fomaml.engines import _torch
from fomaml.errors import InputError
from fomaml.layout import Strides, laid
from fomaml.learning.learner import MetaLearner
from fomaml.learning.problem import Problem
from fomaml.learning.statistics import Met, whole
from fomaml.metrics import ignored_label
from fomaml.models import is_moving
from fomaml.tasks import Batch, Examples, Task, are_labels, count, count_of, shape_of, stack, ways_each
from fomaml.threads import alone
from fomaml.trees import Tree, joined, leaves, mapped

TaskWeights = Literal["equal", "examples"] | Callable[[Task], float]
# (the model at φ, the query set of one task) → a number
Measure = Callable[[Callable[..., Any], Examples], Tensor]


class Engine(Protocol):
    """A way to compute a chunk of a meta-batch: it makes the inner problem of a batch of tasks.

    evaluating, ways, measured: see `Problem`.
    Raises `InputError` for a learner that it does not take.
    """

    def __call__(
        self,
        learner: MetaLearner,
        tasks: Task,
        *,
        evaluating: bool = False,
        ways: int | None = None,
        measured: bool = False,
    ) -> Problem: ...


class MetaGradient(NamedTuple):
    """gradients: by meta-parameter name, the mean over tasks; zeros where nothing depends on it. They have the strides
    of the parameters, which torch's fused optimisers need.

    query_losses: (tasks,) at φ_K. support_losses: (tasks, steps), each at the start of its step.
    query_outputs: (tasks, query examples, ...) at φ_K; -inf for classes that a task does not have, where a start makes
    heads of several numbers of ways. Nested as what the model returns; of a list of tasks a list, in its order; ()
    where a `loss` stands in for outputs. engine: the engine that computed it. Of the first task alone, for those to
    come: moments: what an inner `Adam` that is carried on has at its end, by buffer of `SecondMoments`; statistics:
    those of the batches on its way from θ to φ_K, see `Met`, where batch norms have running ones. Both may be empty
    where an objective takes another way.
    """

    gradients: dict[str, Tensor]
    query_losses: Tensor
    support_losses: Tensor
    query_outputs: Tree | list[Tree]
    engine: str
    moments: Mapping[str, Tensor] = MappingProxyType({})
    statistics: Met = MappingProxyType({})

    def without_gradients(self) -> MetaGradient:
        """The same of tasks that count for nothing, also where their gradients are not finite."""
        return self._replace(gradients={n: torch.zeros_like(g) for n, g in self.gradients.items()})

    def apply_to(self, learner: MetaLearner) -> None:
        """Set `.grad` of the learner's meta-parameters, for any `torch.optim` optimiser to step on."""
        for name, parameter in learner.meta_parameters().items():
            parameter.grad = self.gradients[name]


class Found(NamedTuple):
    """What a chunk of a meta-batch contributes. gradients: by meta-parameter name, one after the other; query_losses
    (tasks,), support_losses (tasks, steps), query_outputs (tasks, ...), moments and statistics (tasks, ...) see
    `SecondMoments.ended` and `Met`.
    """

    gradients: list[Tensor]
    query_losses: Tensor
    support_losses: Tensor
    query_outputs: Tree
    moments: Mapping[str, Tensor] = MappingProxyType({})
    statistics: Met = MappingProxyType({})

    def slopes(self, learner: MetaLearner) -> list[Tensor]:
        """What is compared as gradients are, where it was compiled; the rest as losses are."""
        return [*self.gradients, *self.moments.values(), *leaves(self.statistics)]

    def values(self) -> tuple[Tensor, Tensor, Tree]:
        return self.query_losses, self.support_losses, self.query_outputs


class Curve(NamedTuple):
    """What a chunk of tasks shows on its way. summed: nothing. points: at each, query losses (tasks,) and outputs."""

    summed: list[Tensor]
    points: tuple[tuple[Tensor, Tree], ...]

    def slopes(self, learner: MetaLearner) -> list[Tensor]:
        return []

    def values(self) -> Tree:
        return self.points


class Reached(NamedTuple):
    """Where a chunk of tasks ends. summed: nothing. parameters, buffers: by name, (tasks, ...) each. support_losses:
    (tasks, steps).
    """

    summed: list[Tensor]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    support_losses: Tensor

    def slopes(self, learner: MetaLearner) -> list[Tensor]:
        """What the steps have changed: beside φ itself it would be lost in the rounding."""
        own = dict(learner.model.named_parameters())
        return [
            value - own[name].detach() if value.shape[1:] == own[name].shape else value
            for name, value in self.parameters.items()
        ]

    def values(self) -> Tree:
        return self.buffers, self.support_losses


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
    if any(map(is_moving, problem.replicas.modules)):
        problem.met = {}
    outcome = learner.objective(problem)
    with problem.guard():
        gradients = torch.autograd.grad(
            outcome.scalar / tasks if tasks > 1 else outcome.scalar,
            list(parameters.values()),
            allow_unused=True,
            materialize_grads=True,
        )
    _, losses, outputs, support_losses = outcome
    number = count_of(problem.task.support) if problem.stacked else None
    moments = learner.moments.ended(problem.state, number)
    statistics = whole(problem.met or {}, problem.steps)
    if problem.stacked:
        return Found(list(gradients), losses, support_losses.T, outputs, moments, statistics)
    outputs, moments, statistics = mapped(lambda tensor: tensor[None], (outputs, moments, statistics))
    return Found(list(gradients), losses[None], support_losses[None], outputs, moments, statistics)


def strides_of(learner: MetaLearner) -> dict[str, Strides]:
    """Those of the meta-parameters, by name."""
    return {name: parameter.stride() for name, parameter in learner.meta_parameters().items()}


def accumulate(
    strides: Mapping[str, Strides],
    found: Iterable[Found],
    engine: str,
    divisor: float,
    compiled: bool = False,
) -> MetaGradient:
    """Put the chunks of a meta-batch together, one in memory at a time.

    strides: of the meta-parameters, by name. divisor: of the sums, such as the number of tasks; 1 where they are means
    already. compiled: at the end torch's operators have one thread. Of several the helpers would spin for milliseconds
    on the cores that the next meta-gradient needs.
    """
    found = iter(found)
    first = next(found)
    gradients, seen, rest = first.gradients, first.values(), []
    left = dict(first.moments), dict(first.statistics)
    moments, statistics = mapped(lambda tensor: tensor[0].clone(), left)
    del first  # but for the gradients not held until the end
    for chunk in found:
        # not in place: autograd may hand two parameters the same tensor
        gradients = _torch.add(gradients, chunk.gradients)
        rest.append(chunk.values())
    with alone(compiled):
        losses, support_losses, outputs = (joined([*each]) for each in zip(seen, *rest)) if rest else seen
        gradients = _torch.divide(gradients, divisor) if divisor != 1 else _apart(gradients)
        own = dict(zip(strides, map(laid, gradients, strides.values())))
    return MetaGradient(own, losses, support_losses, outputs, engine, moments, statistics)


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


class Group(NamedTuple):
    """Tasks of a meta-batch that are computed together.

    rows: which ones of it. tasks: these, stacked. ways: their number of classes, so that a start makes each task the
    head that it would have alone; None where no start asks for it, or it is not known by labels. weight: of each.
    """

    rows: list[int]
    tasks: Task
    ways: int | None
    weight: float


def groups(
    learner: MetaLearner, tasks: Batch, weights: Sequence[float] | None = None, ways: int | None = None
) -> list[Group]:
    """A meta-batch by what tasks must have in common to be stacked: shapes, ways and weight, in the order of the first
    of each.

    weights: of the tasks; all 1 by default. ways: of each task, where it is known; else read from the labels for a
        start, which waits for a device.
    """
    number = count(tasks)
    if ways is not None and ignored_label(learner.criterion) in range(ways):
        ways = None  # a label that counts for nothing is no class
    if isinstance(tasks, Task) and weights is None and (learner.start is None or ways is not None):
        own = None if learner.start is None or not are_labels(tasks.support.targets) else ways
        return [Group([*range(number)], tasks, own, 1.0)]
    each = [1.0] * number if weights is None else weights
    if isinstance(tasks, Task):
        kinds: list[tuple] = [*zip(_ways(learner, tasks, ways), each)]
    else:
        stacks = [task.map(lambda tensor: tensor[None]) for task in tasks]
        kinds = [(shape_of(own), *_ways(learner, own, ways), weight) for own, weight in zip(stacks, each)]
    found = []
    for kind in dict.fromkeys(kinds):
        rows = [row for row in range(number) if kinds[row] == kind]
        if not isinstance(tasks, Task):
            own = stack([tasks[row] for row in rows])
        else:
            own = tasks if len(rows) == number else tasks.map(itemgetter(rows))
        found.append(Group(rows, own, *kind[-2:]))
    return found


def _ways(learner: MetaLearner, tasks: Task, known: int | None = None) -> list[int | None]:
    """By task, see `Group`."""
    targets = tasks.support.targets
    if learner.start is None or not are_labels(targets):
        return [None] * count(tasks)
    if known is not None:
        return [known] * count(tasks)
    return [*ways_each(targets, ignored_label(learner.criterion))]


def in_order(groups: Sequence[Group], trees: Sequence[Tree]) -> Tree:
    """What was computed of groups of tasks, (tasks, ...) each, in the order of all tasks.

    Narrower outputs are filled up with -inf.
    """
    if len(trees) == 1:
        return trees[0]
    rows = [row for group in groups for row in group.rows]

    def ordered(*tensors: Tensor) -> Tensor:
        if tensors[0].dim() > 2:
            widest = max(tensor.shape[2] for tensor in tensors)
            after = [0, 0] * (tensors[0].dim() - 3)
            tensors = tuple(F.pad(t, [*after, 0, widest - t.shape[2]], value=-math.inf) for t in tensors)
        return torch.cat(tensors)[torch.tensor(rows, device=tensors[0].device).argsort()]

    return mapped(ordered, *trees)


def one_by_one(groups: Sequence[Group], trees: Sequence[Tree]) -> list[Tree]:
    """What was computed of groups of tasks, (tasks, ...) each, as a list in the order of all tasks."""
    found = {
        row: mapped(itemgetter(place), tree)
        for group, tree in zip(groups, trees)
        for place, row in enumerate(group.rows)
    }
    return [found[row] for row in sorted(found)]


def put_together(groups: Sequence[Group], parts: Sequence[MetaGradient], listed: bool) -> MetaGradient:
    """The meta-gradient of all tasks out of those of groups of them. listed: the outputs as a list."""
    order = one_by_one if listed else in_order
    outputs = order(groups, [part.query_outputs for part in parts])
    if len(parts) == 1:
        return parts[0]._replace(query_outputs=outputs)
    gradients = list(parts[0].gradients.values())
    for part in parts[1:]:
        gradients = list(_torch.add(gradients, list(part.gradients.values())))
    return parts[0]._replace(
        gradients=dict(zip(parts[0].gradients, gradients)),
        query_losses=in_order(groups, [part.query_losses for part in parts]),
        support_losses=in_order(groups, [part.support_losses for part in parts]),
        query_outputs=outputs,
    )


def check_asked(weights: TaskWeights, autocast: torch.dtype | None) -> None:
    """Raise `InputError` for weights of tasks that are neither a name nor a function, and for float16."""
    if not callable(weights):
        check_choice("task_weights", weights, ("equal", "examples"))
    if autocast == torch.float16:
        raise InputError(f"autocast={autocast} {UNSCALED}: take torch.bfloat16")


UNSCALED = "makes gradients below 6e-8 zero, in each inner step too, and nothing here scales them"


def refuse_half(learner: MetaLearner) -> None:
    """Raise `InputError` for parameters in float16."""
    for name, parameter in learner.model.named_parameters():
        if parameter.dtype == torch.float16:
            raise InputError(
                f"the parameter {name} is torch.float16, which {UNSCALED}: model.bfloat16() or model.float()"
            )


def check_sum(weights: Sequence[float]) -> None:
    """Raise `InputError` where no task of a meta-batch counts."""
    if not sum(weights):
        raise InputError(f"the weights of all {len(weights)} tasks of a meta-batch are 0")


OUT_OF_MEMORY = (
    "out of memory",  # CUDA's and MPS's allocators, and the system's
    "can't allocate memory",  # the CPU's allocator
    "not enough memory",  # the same on Windows
    "Cannot allocate memory",
    "ALLOC_FAILED",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "OUT_OF_MEMORY",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was too little memory, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in OUT_OF_MEMORY)


def first_line(error: Exception) -> str:
    """Of an error's message, or the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def curves(
    problems: Iterable[Problem], points: Sequence[tuple[int, Statistics]], measure: Measure | None = None
) -> list[tuple[Tensor, Tree]]:
    """For each number of steps, ascending, and statistics: query losses (tasks,) and outputs
    (tasks, examples, ...), no graph kept.

    measure: its values (tasks,) are given in place of outputs; of problems of one task.
    """
    parts: list[tuple[list[Tensor], list[Tree]]] = [([], []) for _ in points]
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
                if measure is not None:
                    outputs = problem.at(adapted, measure)
            found = losses, outputs
            if not problem.stacked:
                found = mapped(lambda tensor: tensor[None], found)
            for of_all, of_these in zip(part, found):
                of_all.append(of_these)
    return [(torch.cat(losses), joined(outputs)) for losses, outputs in parts]
