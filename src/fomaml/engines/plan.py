"""The door to the engines: the rule that chooses one, and the plan that its caller owns.

`fomaml.engines.plan` is the function; what stands in this file comes by `from fomaml.engines.plan import …`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

from fomaml.choices import Statistics, check_choice
from fomaml.engines import batched, factored, gpu, loop
from fomaml.engines.common import (
    Engine,
    Found,
    Group,
    Measure,
    MetaGradient,
    TaskWeights,
    accumulate,
    check_asked,
    check_sum,
    curves,
    differentiate,
    groups,
    in_order,
    one_by_one,
    out_of_memory,
    put_together,
)
from fomaml.engines.probes import explain, flops, is_convolutional, takers, tried
from fomaml.errors import not_negative, positive
from fomaml.learning.adapt import ordinary_modes
from fomaml.learning.learner import MetaLearner
from fomaml.learning.turns import turn_of
from fomaml.tasks import Batch, Task, as_batch, chunks, count, count_of, device_of, one, shape_of
from fomaml.trees import Tree, leaves

ENGINES: dict[str, Engine] = {
    "loop": loop.problem,
    "batched": batched.problem,
    "factored": factored.problem,
}
PartOf = tuple[Sequence[float] | None, float] | None  # see `Plan.__call__`


# --- the rule -------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """What follows from a learner, the shapes of its tasks, the device and the number of threads; see `Plan`.

    stacks: whether convolutions are to be stacked when compiled.
    """

    engine: str
    why: str
    tasks_at_once: int
    stacks: bool


def choose(learner: MetaLearner, tasks: Task, compile: bool = False) -> tuple[str, str]:
    """The name of the engine for this learner and these tasks, and the reason in one line.

    A rule and no race: engines round differently, and a run must end the same however busy the machine was.
    Measured on a CPU: vmap makes grouped convolutions of convolutions, 2.5-3.3 times slower than the loop on
    Conv4, but on small strided ones the loop's overhead weighs more (2 times slower). Compiled, both take fused
    kernels, tasks side by side, and small convolutions are stacked without being grouped. The factored engine pays
    where few vectors go through wide Linear layers; other wide layers take the loop (1.3-1.8 times faster than vmap
    on a 784-256-10 MLP, second order and Reptile), or, compiled, vmap.
    """
    on_cpu = device_of(tasks).type == "cpu"
    if is_convolutional(learner) and on_cpu:
        millions = flops(learner, tasks) / 1e6
        how = ", compiled" if compile else ""
        if millions > 50 or not takers(learner, tasks)[0]:
            return "loop", f"convolutions on a CPU, {millions:.0f} million operations a task{how}"
        return "batched", f"small convolutions, {millions:.0f} million operations a task{how}"
    vmaps, vectors = takers(learner, tasks)
    if not vmaps:
        return "loop", "something in the model that vmap does not take"
    own = dict(learner.model.named_parameters())
    wide = [
        own[n] for n, rows in vectors.items() if min(own[n].shape) > 2 * rows or own[n].shape[1] > 8 * rows
    ]
    large, rows = sum(weight.numel() for weight in wide), max(vectors.values(), default=0)
    large = large if large > sum(own[n].numel() for n in learner.adapted) / 2 else 0
    if not on_cpu:
        return gpu.choose(learner, tasks, large, rows, compile)
    # below 20 000 the bookkeeping costs more: 1.2 times on a 1-40-40-1 MLP
    if large > 20_000:
        return "factored", f"linear layers much wider than the {rows} vectors of a support set"
    if max(own[n].numel() for n in learner.adapted) > 100_000 and not compile:
        return "loop", "wide layers on a CPU, which the factored engine does not take here"
    return "batched", "dense layers, compiled" if compile else "small dense layers"


def choice(
    learner: MetaLearner, tasks: Batch, engine: str, tasks_at_once: int | None, compile: bool
) -> Choice:
    """The choice for a batch; for a list of tasks by those of one shape that have the most numbers."""
    check_choice("engine", engine, ("auto", *ENGINES))
    number = count(tasks)
    if not isinstance(tasks, Task):
        own = [group.tasks for group in groups(learner, tasks)]
        for each in own:
            tried(learner, each)
        tasks = max(own, key=lambda each: sum(leaf.numel() for leaf in leaves(each)))
    else:
        tried(learner, tasks)
    engine, why = choose(learner, tasks, compile) if engine == "auto" else (engine, "as asked")
    stacks = compile and engine == "batched" and is_convolutional(learner) and device_of(tasks).type == "cpu"
    return Choice(engine, why, _at_once(learner, tasks, number, engine, tasks_at_once, compile), stacks)


def _at_once(
    learner: MetaLearner, tasks: Task, number: int, engine: str, tasks_at_once: int | None, compile: bool
) -> int:
    """How many tasks to compute at once, where they fit into memory. number: of all."""
    if tasks_at_once is not None:
        positive("tasks_at_once", tasks_at_once, integer=True)
    if engine == "loop":
        return 1
    if tasks_at_once is not None:
        return min(tasks_at_once, number)
    if device_of(tasks).type != "cpu":
        return gpu.at_once(learner, tasks, number, engine, compile)
    if number > 8:
        if is_convolutional(learner):
            # measured on small strided convolutions: 8 or 16 at once are 1.2 times as fast as 32, which leave the
            # cache; but stacked 32 are 1.2 times as fast as 8, as there is less between their kernels
            return min(number, 32) if compile else 8
        if compile:
            return _few(learner, tasks, number, engine)
    return number


def _few(learner: MetaLearner, tasks: Task, number: int, engine: str) -> int:
    """How many tasks of compiled dense layers on a CPU, each on one thread, are faster than all of them on all threads.

    Measured: 8 of `batched` are 1.15 to 1.35 times as fast as 32 on one thread from 6 million operations a task on, as
    fast at half a million. `factored` has large products that know no tasks: 16 are as fast as 32 on one thread and
    1.2 times on two at 30 million, slower at 2 million. Fewer chunks than threads would leave threads without work.
    """
    most, least_flops = {"batched": (8, 2e6), "factored": (16, 1e7)}[engine]
    if flops(learner, tasks) < least_flops:
        return number
    enough = min(most, number // torch.get_num_threads())
    return next((few for few in range(enough, most // 2 - 1, -1) if number % few == 0), number)


# --- the plan -------------------------------------------------------------------------------------


class Plan:
    """How the meta-gradient of a learner is computed: `plan(tasks)`; see the function `plan`, which makes it.

    engine: the engine's name. why: the reason, in one line.
    tasks_at_once: at most so many tasks are in memory at a time. When memory runs out it is halved, with a warning,
        and stays so: kept with a run, it can be given to the plan with which the run goes on.
    seen: of lists of tasks, what stands for the shapes that have come before, which are compiled when they come back;
        kept with a run, so that it goes on with the same ones.
    """

    def __init__(
        self,
        learner: MetaLearner,
        choice: Choice,
        compile: bool = False,
        autocast: torch.dtype | None = None,
        task_weights: TaskWeights = "equal",
    ):
        self.learner = learner
        self.choice = choice
        self.compile = compile
        self.autocast = autocast
        self.task_weights = task_weights
        self.seen: set[str] = set()
        self._like: list[tuple] = []

    @property
    def engine(self) -> str:
        return self.choice.engine

    @property
    def why(self) -> str:
        return self.choice.why

    @property
    def tasks_at_once(self) -> int:
        return self.choice.tasks_at_once

    def __call__(self, tasks: Batch, part_of: PartOf = None, ways: int | None = None) -> MetaGradient:
        """The gradient of the meta-loss, averaged over a batch of tasks; see `meta_gradient`.

        part_of: where they are a part of a meta-batch, the weights of these tasks, None for 1 each, and the sum of the
            weights of all its tasks: what these contribute to the mean over all is computed.
        ways: the number of classes of each support set where it is known, see `groups`.
        """
        with turn_of(self.learner.model):
            if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
                return self._compute(self._looked_at(tasks), part_of, ways)
            with ordinary_modes():
                return self._compute(self._looked_at(tasks), part_of, ways)

    def curve(
        self,
        tasks: Batch,
        points: Sequence[tuple[int, Statistics]],
        measured: Measure | bool = False,
        ways: int | None = None,
    ) -> list[tuple[Tensor, Tree]]:
        """Query losses (tasks,) and outputs (tasks, examples, ...) at each pair of a number of inner steps and
        statistics, ascending by steps: tasks are adapted once for all of them. Of a list of tasks outputs are lists.

        Never compiled, and in the model's own precision but within `precision`. statistics: see `Problem.query`.
        measured: True for the outputs of a learner with a `loss` too, see `Problem`; or a function (the model at φ,
            query examples) → a number, whose values (tasks,) are given in place of outputs. ways: as of a call.
        """
        with turn_of(self.learner.model), ordinary_modes():
            return self._curve(self._looked_at(tasks), points, measured, ways)

    def _curve(
        self,
        tasks: Batch,
        points: Sequence[tuple[int, Statistics]],
        measured: Measure | bool = False,
        ways: int | None = None,
    ) -> list[tuple[Tensor, Tree]]:
        measure = measured if callable(measured) else None
        engine = "loop" if measure else self.engine
        problem = partial(ENGINES[engine], self.learner, evaluating=True, measured=measured is True)
        own = groups(self.learner, tasks, ways=ways)
        parts: list[list[tuple[Tensor, Tree]]] = []
        for number, group in enumerate(own):
            while len(parts) <= number:
                size = 1 if measure else min(self.tasks_at_once, len(group.rows))
                try:
                    problems = (problem(chunk, ways=group.ways) for chunk in chunks(group.tasks, size))
                    parts.append(curves(problems, points, measure))
                except Exception as error:  # whatever a module raises
                    self._halve(size, error, group.tasks)
        listed = not isinstance(tasks, Task) and measure is None
        return [
            (in_order(own, losses), (one_by_one if listed else in_order)(own, outputs))
            for losses, outputs in (zip(*of_groups) for of_groups in zip(*parts))
        ]

    def weights(self, tasks: Batch) -> list[float] | None:
        """The weights of the tasks of a batch in the meta-loss; None if they are all the same.

        Raises:
            InputError: a function that gives no number of 0 or more, or 0 for all tasks.
        """
        if self.task_weights == "equal" or (self.task_weights == "examples" and isinstance(tasks, Task)):
            return None
        found = self.each_weight(tasks)
        check_sum(found)
        return None if len(set(found)) == 1 else found

    def each_weight(self, tasks: Batch) -> list[float]:
        """The weight of each task, whether or not they are all the same."""
        return [self._weight(one(tasks, index)) for index in range(count(tasks))]

    def _weight(self, task: Task) -> float:
        if not callable(self.task_weights):
            return 1.0 if self.task_weights == "equal" else float(count_of(task.query))
        return not_negative("the weight of a task", self.task_weights(task))

    def _compute(self, tasks: Batch, part_of: PartOf = None, ways: int | None = None) -> MetaGradient:
        """As `__call__`, of a batch that was looked at; a frame between what the user calls and what warns, so that
        warnings name the user's line.
        """
        if part_of is None:
            weights = self.weights(tasks)
            part_of = weights, float(count(tasks)) if weights is None else sum(weights)
        weights, total = part_of
        own = groups(self.learner, tasks, weights, ways)
        # a mean over a number that stays the same is in the graph of what is compiled, where it costs nothing
        fixed = count(tasks) if isinstance(tasks, Task) and weights is None else 1
        parts: list[MetaGradient] = []
        for number, group in enumerate(own):
            compiles = self.compile and (isinstance(tasks, Task) or self._came_back(group))
            find = partial(self._find, ways=group.ways, engine=self.engine)
            while len(parts) <= number:
                size = most = min(self.tasks_at_once, len(group.rows))
                try:
                    function = None
                    if compiles:
                        from fomaml.engines.compiled import cache

                        # one shape, compiled once
                        size = next(n for n in range(most, 0, -1) if len(group.rows) % n == 0)
                        mean = partial(find, tasks=fixed)
                        alone = partial(mean, engine="loop") if self.choice.stacks else None
                        side_by_side = size < len(group.rows) and size * torch.get_num_threads() <= len(
                            group.rows
                        )
                        facts = (self.engine, group.ways, self.autocast, fixed)
                        rest = chunks(group.tasks, size)
                        function = cache.function(
                            self.learner, next(rest), mean, facts, alone, side_by_side, rest
                        )
                    divisor = total / group.weight if group.weight else math.inf
                    if function is None:
                        names, found = (
                            list(self.learner.meta_parameters()),
                            map(find, chunks(group.tasks, size)),
                        )
                    else:
                        names, found = function.names, function.map(chunks(group.tasks, size))
                        divisor /= fixed
                    part = accumulate(names, found, self.engine, divisor)
                    parts.append(part if group.weight else part.without_gradients())
                except Exception as error:  # whatever a module raises
                    self._halve(most, error, group.tasks)
        return put_together(own, parts, listed=not isinstance(tasks, Task))

    def _came_back(self, group: Group) -> bool:
        """Whether tasks of a list like these, as many of this shape, have come before: then they are compiled."""
        key = sha256(repr((len(group.rows), group.ways, shape_of(group.tasks))).encode()).hexdigest()[:16]
        came = key in self.seen
        self.seen.add(key)
        return came

    def _looked_at(self, tasks: Batch) -> Batch:
        """A batch of tasks, see `as_batch`; tensors like those of the call before are not looked at again."""
        if type(tasks) is Task and all(type(tensor) is Tensor for part in tasks for tensor in part):
            like = [(t.shape, t.dtype, t.is_inference()) for part in tasks for t in part]
            if like == self._like:
                return tasks
            found = as_batch(tasks, self.learner.model)
            assert isinstance(found, Task)
            same = all(new is old for news, olds in zip(found, tasks) for new, old in zip(news, olds))
            self._like = like if same else []
            return found
        return as_batch(tasks, self.learner.model)

    def _find(self, chunk: Task, ways: int | None, engine: str, tasks: int = 1) -> Found:
        """What a chunk contributes to a meta-gradient, by an engine. tasks: see `differentiate`."""
        with self.precision(chunk):
            return differentiate(self.learner, ENGINES[engine](self.learner, chunk, ways=ways), tasks)

    def precision(self, tasks: Batch) -> AbstractContextManager:
        """Within it forward passes are of the precision in which these tasks are trained on."""
        return (
            nullcontext() if self.autocast is None else torch.autocast(device_of(tasks).type, self.autocast)
        )

    def _halve(self, size: int, error: Exception, tasks: Task) -> None:
        """Half as many tasks at once from now on, if that may mend the error of so many; else raise it."""
        if size == 1 or not out_of_memory(error):
            explain(error, self.learner, tasks, self.engine)
            raise error
        self.choice = self.choice._replace(tasks_at_once=(size + 1) // 2)
        text = f"out of memory: {self.tasks_at_once} tasks at once from now on"
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def plan(
    learner: MetaLearner,
    tasks: Batch,
    *,
    engine: str = "auto",
    tasks_at_once: int | None = None,
    compile: bool = False,
    autocast: torch.dtype | None = None,
    task_weights: TaskWeights = "equal",
) -> Plan:
    """The plan for a learner as it is now and for batches like `tasks`, to be kept for a whole run.

    It depends on the learner, the shapes and dtypes of the tasks, the device and torch's number of threads alone, never
    on what was computed before. The learner is tried on two of the tasks where the choice needs it.

    tasks: tensors (tasks, examples, ...), or a list of single tasks of any shapes; later batches may have other sizes.
    engine: "loop", "batched", "factored" or "auto".
    tasks_at_once: at most so many tasks in memory at a time ("loop" takes one in any case), compiled on a CPU by each
        thread; by default as many as suit the engine.
    compile: compile the whole meta-gradient, once for each shape of the tasks, of a list the shapes that come back;
        where that cannot be, a warning says so and the engine runs uncompiled.
    autocast: run the forward passes in this lower precision, `torch.bfloat16`, see `torch.autocast`.
    task_weights: how much each task counts in the meta-loss, Σ wᵢ Lᵢ / Σ wᵢ: "equal", "examples" for the number of its
        query examples, or a function of the `Task`.

    Raises:
        InputError: an unknown engine, tasks_at_once that is no positive whole number, or float16.
    """
    check_asked(task_weights, autocast)
    with turn_of(learner.model), ordinary_modes():
        tasks = as_batch(tasks, learner.model)
        own = choice(learner, tasks, engine, tasks_at_once, compile)
        return Plan(learner, own, compile, autocast, task_weights)
