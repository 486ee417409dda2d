"""The door to the engines: the rule that chooses one, and the plan that its caller owns.

`fomaml.engines.plan` is the function; what stands in this file comes by `from fomaml.engines.plan import …`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from fomaml.choices import Statistics, check_choice
from fomaml.engines import gpu
from fomaml.engines.adaptation import Way, curve_of
from fomaml.engines.common import (
    Found,
    Measure,
    MetaGradient,
    TaskWeights,
    accumulate,
    check_asked,
    check_sum,
    differentiate,
    groups,
    out_of_memory,
    put_together,
    strides_of,
)
from fomaml.engines.compiling import Choice, Choosing, Compiling, like_of
from fomaml.engines.known import AS_ASKED, ENGINES
from fomaml.engines.pays import Compile, begin_kernels, check_compile, pays
from fomaml.engines.probes import explain, flops, is_convolutional, suits_kernels, takers, tried
from fomaml.errors import InputError, not_negative, positive
from fomaml.learning.adapt import ordinary_modes
from fomaml.learning.learner import MetaLearner
from fomaml.learning.objectives import MultiStepLoss
from fomaml.learning.turns import turn_of
from fomaml.tasks import Batch, Task, as_batch, chunks, count, count_of, device_of, one
from fomaml.trees import Tree, leaves

# --- the rule -------------------------------------------------------------------------------------


PartOf = tuple[Sequence[float] | None, float] | None  # see `Plan.__call__`


def choose(learner: MetaLearner, tasks: Task, compile: bool = False) -> tuple[str, str]:
    """The name of the engine for this learner and these tasks, and the reason in one line.

    A rule and no race: engines round differently, and a run must end the same however busy the machine was.
    Measured on a CPU: vmap makes grouped convolutions of convolutions, 2.5-3.3 times slower than the loop on
    Conv4, but on small strided ones the loop's overhead weighs more (2 times slower). Compiled, both take fused
    kernels, tasks side by side, and convolutions are stacked without being grouped: below 200 million operations a
    forward pass, on average over inner steps and query set, 1 to 2 times faster than the loop, above 400 slower; where
    the kernels do not take all of them, or there are other norms than batch norms, slower from 10 to 40 million on.
    The factored engine pays where few vectors go through wide Linear layers; other wide layers take the loop (1.3-1.8
    times faster than vmap on a 784-256-10 MLP, second order and Reptile), or, compiled, vmap.
    """
    on_cpu = device_of(tasks).type == "cpu"
    if is_convolutional(learner) and on_cpu:
        millions = (_flops_of_pass if compile else flops)(learner, tasks) / 1e6
        how = "a forward pass, compiled" if compile else "a task"
        most = 50 if not compile else 200 if suits_kernels(learner) else 10
        if millions > most or not takers(learner, tasks)[0]:
            return "loop", f"convolutions on a CPU, {millions:.0f} million operations {how}"
        return "batched", f"small convolutions, {millions:.0f} million operations {how}"
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
    # below 20 000 the bookkeeping costs more: 1.2 times on a 1-40-40-1 MLP; compiled there is little of it: 0.93
    if large > (1_000 if compile else 20_000):
        return "factored", f"linear layers much wider than the {rows} vectors of a support set"
    if max(own[n].numel() for n in learner.adapted) > 100_000 and not compile:
        return "loop", "wide layers on a CPU, which the factored engine does not take here"
    return "batched", "dense layers, compiled" if compile else "small dense layers"


def _flops_of_pass(learner: MetaLearner, tasks: Task) -> float:
    """The operations of a forward pass of a task, on average over the inner steps and the query set."""
    support, query = map(count_of, one(tasks, 0))
    each = flops(learner, tasks) / query
    return each * (learner.inner_steps * support + query) / (learner.inner_steps + 1)


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
    engine, why = choose(learner, tasks, compile) if engine == "auto" else (engine, AS_ASKED)
    stacks = compile and engine == "batched" and is_convolutional(learner) and device_of(tasks).type == "cpu"
    if compile:
        begin_kernels(learner, tasks, stacks)
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
            # cache; but stacked 32 of 27 million operations are 1.2 times as fast as 8, of 53 million 1.06, as there
            # is less between their kernels
            return min(number, 32, max(8, int(1.6e9 / _flops_of_pass(learner, tasks)))) if compile else 8
        if compile:
            return _few(learner, tasks, number, engine)
    return number


def _few(learner: MetaLearner, tasks: Task, number: int, engine: str) -> int:
    """How many tasks of compiled dense layers on a CPU, each on one thread, are faster than all of them on all threads.

    Measured: 8 of `batched` are 1.15 to 1.35 times as fast as 32 on one thread from 6 million operations a task on, as
    fast at half a million; where 400 kB adapt, 4 are 1.06 times as fast as 8, and 2 as fast as 4. `factored` has large
    products that know no tasks: 16 are as fast as 32 on one thread and 1.2 times on two at 30 million, slower at 2
    million. Fewer chunks than threads would leave threads without work.
    """
    most, least_flops = {"batched": (8, 2e6), "factored": (16, 1e7)}[engine]
    if flops(learner, tasks) < least_flops:
        return number
    if engine == "batched":
        own = dict(learner.model.named_parameters())
        most = min(most, max(4, int(2e6 / sum(own[name].nbytes for name in learner.adapted))))
    enough = min(most, number // torch.get_num_threads())
    return next((few for few in range(enough, most // 2 - 1, -1) if number % few == 0), number)


# --- the plan -------------------------------------------------------------------------------------


class Plan(Choosing):
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
        compiling: Compiling | None = None,
        autocast: torch.dtype | None = None,
        task_weights: TaskWeights = "equal",
    ):
        self.learner = learner
        self.choice = choice
        self.compiling = compiling or Compiling(False)
        self.autocast = autocast
        self.task_weights = task_weights
        self._like: list[tuple] = []
        self.way: Way | None = None  # how tasks are adapted when compiled

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
        compile: bool = False,
        quietly: bool = False,
    ) -> list[tuple[Tensor, Tree]]:
        """Query losses (tasks,) and outputs (tasks, examples, ...) at each pair of a number of inner steps and
        statistics, ascending by steps: tasks are adapted once for all of them. Of a list of tasks outputs are lists.

        In the model's own precision but within `precision`. statistics: see `Problem.query`.
        measured: True for the outputs of a learner with a `loss` too, see `Problem`; or a function (the model at φ,
            query examples) → a number, whose values (tasks,) are given in place of outputs. ways: as of a call.
        compile: trace it once for each shape of the tasks, points and statistics, and compare it with the engine;
            without torch's compiler on a CPU, so that it takes seconds. Few tasks of a shape among a list of others,
            and functions that measure, are never compiled. quietly: no warning where it cannot be.
        """
        with turn_of(self.learner.model), ordinary_modes():
            return curve_of(self, self._looked_at(tasks), points, measured, compile, quietly, ways)

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
            compiles = self.compiling.takes(group, isinstance(tasks, Task), len(own))
            while len(parts) <= number:
                find = partial(self._find, ways=group.ways, engine=self.engine)
                size = most = min(self.tasks_at_once, len(group.rows))
                try:
                    function = None
                    if compiles and self.compile:
                        if isinstance(self.learner.objective, MultiStepLoss):
                            raise InputError(
                                "compile=True does not take the multi-step loss: its weights change at every "
                                "iteration"
                            )
                        function, size = self.compiling.function(
                            self.learner, group, find, self.choice, self.autocast, fixed
                        )
                        if not self.compile:  # it cannot be: another engine takes over
                            self.run_eagerly(self.compiling.failure)
                            continue
                    divisor = total / group.weight if group.weight else math.inf
                    if function is None:
                        found, strides = map(find, chunks(group.tasks, size)), strides_of(self.learner)
                    else:
                        found, strides = function.map(chunks(group.tasks, size)), function.strides
                        divisor /= fixed
                    part = accumulate(strides, found, self.engine, divisor, function is not None)
                    parts.append(part if group.weight else part.without_gradients())
                except Exception as error:  # whatever a module raises
                    self.halve(most, error, group.tasks)
        return put_together(own, parts, listed=not isinstance(tasks, Task))

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

    def halve(self, size: int, error: Exception, tasks: Task) -> None:
        """Half as many tasks at once from now on, if that may mend the error of so many; else raise it."""
        if size == 1 or not out_of_memory(error):
            explain(error, self.learner, tasks, self.engine)
            raise error
        self.choice = self.choice._replace(tasks_at_once=(size + 1) // 2)
        self.way = self.way and self.way._replace(tasks_at_once=self.tasks_at_once)
        text = f"out of memory: {self.tasks_at_once} tasks at once from now on"
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def plan(
    learner: MetaLearner,
    tasks: Batch,
    *,
    engine: str = "auto",
    tasks_at_once: int | None = None,
    compile: Compile = False,
    autocast: torch.dtype | None = None,
    task_weights: TaskWeights = "equal",
    iterations: int | None = None,
    decided: bool | None = None,
) -> Plan:
    """The plan for a learner as it is now and for batches like `tasks`, to be kept for a whole run.

    It depends on the learner, the shapes and dtypes of the tasks, the device and torch's number of threads alone, never
    on what was computed before. The learner is tried on two of the tasks where the choice needs it.

    tasks: tensors (tasks, examples, ...), or a list of single tasks of any shapes; later batches may have other sizes.
    engine: "loop", "batched", "factored" or "auto".
    tasks_at_once: at most so many tasks in memory at a time ("loop" takes one in any case), compiled on a CPU by each
        thread; by default as many as suit the engine.
    compile: compile the whole meta-gradient, once for each shape of the tasks, of a list the shapes that come back;
        where that cannot be, a warning says so and the engine runs uncompiled. "auto": where it pays, by a rule that
        `why` tells, for tasks like these; where it cannot be, `why` says so.
    autocast: run the forward passes in this lower precision, `torch.bfloat16`, see `torch.autocast`.
    task_weights: how much each task counts in the meta-loss, Σ wᵢ Lᵢ / Σ wᵢ: "equal", "examples" for the number of its
        query examples, or a function of the `Task`.
    iterations: how often the plan will be called in all, for "auto", which takes an unknown number for few.
    decided: in place of that rule, what a run had decided that goes on: it stops where it was compiled and cannot be.

    Raises:
        InputError: an unknown engine, tasks_at_once or iterations that are no positive whole number, or float16.
    """
    check_asked(task_weights, autocast)
    check_compile(compile)
    with turn_of(learner.model), ordinary_modes():
        tasks = as_batch(tasks, learner.model)
        given = learner, tasks, engine, tasks_at_once
        if compile != "auto":
            on = compile if decided is None else decided
            return Plan(
                learner,
                choice(*given, compile),
                Compiling(on, stops=on and decided is True),
                autocast,
                task_weights,
            )
        eager = choice(*given, False)
        on, why = pays(learner, tasks, eager.engine, autocast, iterations, decided)
        own = choice(*given, True) if on else eager
        compiling = Compiling(on, eager, like_of(groups(learner, tasks)[0]), stops=on and decided is True)
        return Plan(learner, own._replace(why=f"{own.why}; {why}"), compiling, autocast, task_weights)
