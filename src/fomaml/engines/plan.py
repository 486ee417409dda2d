"""The door to the engines: the rule that chooses one, and the plan that its caller owns.

`fomaml.engines.plan` is the function; what stands in this file comes by `from fomaml.engines.plan import …`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fomaml.choices import Statistics, check_choice
from fomaml.engines import batched, factored, loop
from fomaml.engines.common import (
    Engine,
    Found,
    MetaGradient,
    accumulate,
    by_ways,
    curves,
    differentiate,
    in_order,
    joined,
    out_of_memory,
)
from fomaml.engines.probes import explain, flops, is_convolutional, takers, try_once
from fomaml.errors import positive
from fomaml.learning.adapt import ordinary_modes
from fomaml.learning.learner import MetaLearner
from fomaml.tasks import Task, as_batch, chunks, count

ENGINES: dict[str, Engine] = {
    "loop": loop.problem,
    "batched": batched.problem,
    "factored": factored.problem,
}

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
    device = tasks.support.inputs.device.type
    if is_convolutional(learner) and device == "cpu":
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
    large = sum(weight.numel() for weight in wide)
    # below 20 000 the bookkeeping costs more: 1.2 times on a 1-40-40-1 MLP
    if large > max(20_000, sum(own[n].numel() for n in learner.adapted) / 2):
        rows = max(vectors.values())
        return "factored", f"linear layers much wider than the {rows} vectors of a support set"
    if device != "cpu":
        return "batched", f"one kernel for all tasks on {device}"
    if max(own[n].numel() for n in learner.adapted) > 100_000 and not compile:
        return "loop", "wide layers on a CPU, which the factored engine does not take here"
    return "batched", "dense layers, compiled" if compile else "small dense layers"


def choice(
    learner: MetaLearner, tasks: Task, engine: str, tasks_at_once: int | None, compile: bool
) -> Choice:
    check_choice("engine", engine, ("auto", *ENGINES))
    try_once(learner, tasks)
    engine, why = choose(learner, tasks, compile) if engine == "auto" else (engine, "as asked")
    on_cpu = tasks.support.inputs.device.type == "cpu"
    stacks = compile and engine == "batched" and on_cpu and is_convolutional(learner)
    return Choice(engine, why, _at_once(learner, tasks, engine, tasks_at_once, compile), stacks)


def _at_once(learner: MetaLearner, tasks: Task, engine: str, tasks_at_once: int | None, compile: bool) -> int:
    """How many tasks to compute at once, where they fit into memory."""
    if tasks_at_once is not None:
        positive("tasks_at_once", tasks_at_once, integer=True)
    if engine == "loop":
        return 1
    if tasks_at_once is not None:
        return min(tasks_at_once, count(tasks))
    if count(tasks) > 8 and tasks.support.inputs.device.type == "cpu":
        if is_convolutional(learner):
            # measured on small strided convolutions: 8 or 16 at once are 1.2 times as fast as 32, which leave the
            # cache; but stacked 32 are 1.2 times as fast as 8, as there is less between their kernels
            return min(count(tasks), 32) if compile else 8
        if compile:
            return _few(learner, tasks, engine)
    return count(tasks)


def _few(learner: MetaLearner, tasks: Task, engine: str) -> int:
    """How many tasks of compiled dense layers on a CPU, each on one thread, are faster than all of them on all threads.

    Measured: 8 of `batched` are 1.15 to 1.35 times as fast as 32 on one thread from 6 million operations a task on, as
    fast at half a million. `factored` has large products that know no tasks: 16 are as fast as 32 on one thread and
    1.2 times on two at 30 million, slower at 2 million. Fewer chunks than threads would leave threads without work.
    """
    number = count(tasks)
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
    """

    def __init__(
        self,
        learner: MetaLearner,
        choice: Choice,
        compile: bool = False,
        autocast: torch.dtype | None = None,
    ):
        self.learner = learner
        self.choice = choice
        self.compile = compile
        self.autocast = autocast
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

    def __call__(self, tasks: Task) -> MetaGradient:
        """The gradient of the meta-loss, averaged over a batch of tasks; see `meta_gradient`."""
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return self._compute(self._looked_at(tasks))
        with ordinary_modes():
            return self._compute(self._looked_at(tasks))

    def curve(self, tasks: Task, points: Sequence[tuple[int, Statistics]]) -> list[tuple[Tensor, Tensor]]:
        """Query losses (tasks,) and outputs (tasks, examples, ...) at each pair of a number of inner steps and
        statistics, ascending by steps: tasks are adapted once for all of them.

        Never compiled, and in the model's own precision. statistics: see `Problem.query`.
        """
        with ordinary_modes():
            return self._curve(self._looked_at(tasks), points)

    def _curve(self, tasks: Task, points: Sequence[tuple[int, Statistics]]) -> list[tuple[Tensor, Tensor]]:
        problem = partial(ENGINES[self.engine], self.learner, evaluating=True)
        groups: list[list[int]] = []
        parts: list[list[tuple[Tensor, Tensor]]] = []
        for rows, group, ways in by_ways(self.learner, tasks):
            groups.append(rows)
            while len(parts) < len(groups):
                size = min(self.tasks_at_once, count(group))
                try:
                    problems = (problem(chunk, ways=ways) for chunk in chunks(group, size))
                    parts.append(curves(problems, points))
                except Exception as error:  # whatever a module raises
                    self._halve(size, error, group)
        return [
            (in_order(groups, losses), in_order(groups, outputs))
            for losses, outputs in (zip(*of_groups) for of_groups in zip(*parts))
        ]

    def _compute(self, tasks: Task) -> MetaGradient:
        """As `__call__`, of a batch that was looked at; a frame between what the user calls and what warns, so that
        warnings name the user's line.
        """
        learner = self.learner
        groups: list[list[int]] = []
        parts: list[MetaGradient] = []
        total = count(tasks)
        for rows, group, ways in by_ways(learner, tasks):
            groups.append(rows)
            number = len(rows)
            find = partial(self._find, ways=ways, engine=self.engine)
            while len(parts) < len(groups):
                size = most = min(self.tasks_at_once, number)
                try:
                    function = None
                    if self.compile:
                        from fomaml.engines.compiled import cache

                        # one shape, compiled once
                        size = next(n for n in range(most, 0, -1) if number % n == 0)
                        mean = partial(find, tasks=total)
                        alone = partial(mean, engine="loop") if self.choice.stacks else None
                        side_by_side = size < number and size * torch.get_num_threads() <= number
                        facts = (self.engine, ways, self.autocast, total)
                        rest = chunks(group, size)
                        function = cache.function(learner, next(rest), mean, facts, alone, side_by_side, rest)
                    if function is None:
                        names, found = list(learner.meta_parameters()), map(find, chunks(group, size))
                    else:
                        names, found = function.names, function.map(chunks(group, size))
                    parts.append(accumulate(names, found, self.engine, total if function is None else 1))
                except Exception as error:  # whatever a module raises
                    self._halve(most, error, group)
        return joined(groups, parts)

    def _looked_at(self, tasks: Task) -> Task:
        """A batch of tasks, see `as_batch`; tensors like those of the call before are not looked at again."""
        if type(tasks) is Task and all(type(tensor) is Tensor for part in tasks for tensor in part):
            like = [(t.shape, t.dtype, t.is_inference()) for part in tasks for t in part]
            if like == self._like:
                return tasks
            found = as_batch(tasks, self.learner.model)
            same = all(new is old for news, olds in zip(found, tasks) for new, old in zip(news, olds))
            self._like = like if same else []
            return found
        return as_batch(tasks, self.learner.model)

    def _find(self, chunk: Task, ways: int | None, engine: str, tasks: int = 1) -> Found:
        """What a chunk contributes to a meta-gradient, by an engine. tasks: see `differentiate`."""
        device = chunk.support.inputs.device.type
        with torch.autocast(device, self.autocast) if self.autocast is not None else nullcontext():
            return differentiate(self.learner, ENGINES[engine](self.learner, chunk, ways=ways), tasks)

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
    tasks: Task,
    *,
    engine: str = "auto",
    tasks_at_once: int | None = None,
    compile: bool = False,
    autocast: torch.dtype | None = None,
) -> Plan:
    """The plan for a learner as it is now and for batches like `tasks`, to be kept for a whole run.

    It depends on the learner, the shapes and dtypes of the tasks, the device and torch's number of threads alone, never
    on what was computed before. The learner is tried on two of the tasks where the choice needs it.

    tasks: tensors (tasks, examples, ...); later batches may have other sizes.
    engine: "loop", "batched", "factored" or "auto".
    tasks_at_once: at most so many tasks in memory at a time ("loop" takes one in any case), compiled on a CPU by each
        thread; by default as many as suit the engine.
    compile: compile the whole meta-gradient, once for each shape of the tasks; where that cannot be, a
        warning says so and the engine runs uncompiled.
    autocast: run the forward passes in this lower precision (`torch.bfloat16`), see `torch.autocast`.

    Raises:
        InputError: an unknown engine, or tasks_at_once that is no positive whole number.
    """
    with ordinary_modes():
        tasks = as_batch(tasks, learner.model)
        return Plan(learner, choice(learner, tasks, engine, tasks_at_once, compile), compile, autocast)
