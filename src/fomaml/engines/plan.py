"""The door to the engines: by name, or the one that suits the module, the sizes and the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.random import fork_rng
from torch.utils.flop_counter import FlopCounterMode

from fomaml.choices import Statistics
from fomaml.engines import batched, factored, loop
from fomaml.engines.common import (
    Found,
    MetaGradient,
    accumulate,
    curves,
    differentiate,
    first_line,
    out_of_memory,
)
from fomaml.engines.compiled import trace
from fomaml.errors import InputError, positive
from fomaml.learning.learner import MetaLearner
from fomaml.learning.problem import Problem
from fomaml.tasks import Task, chunks, count, one

ENGINES = {"loop": loop.problem, "batched": batched.problem, "factored": factored.problem}


def meta_gradient(
    learner: MetaLearner,
    tasks: Task,
    *,
    engine: str = "auto",
    tasks_at_once: int | None = None,
    compile: bool = False,
    autocast: torch.dtype | None = None,
) -> MetaGradient:
    """The gradient of the meta-loss by meta-parameter name, averaged over a batch of tasks.

    tasks: tensors (tasks, examples, ...). engine: "loop", "batched", "factored" or "auto".
    tasks_at_once: at most so many tasks in memory at a time ("loop" takes one in any case), compiled on a CPU by each
        thread; by default as many as suit the engine, and half as many, from then on, when memory runs out.
    compile: compile the whole meta-gradient, once for each shape of the tasks; where that cannot be, a
        warning says so and the engine runs uncompiled.
    autocast: run the forward passes in this lower precision (`torch.bfloat16`), see `torch.autocast`.

    Raises:
        InputError: an unknown engine, one that does not take this learner, or outputs narrower than
            the number of classes.
    """
    engine, size, stacks = _plan(learner, tasks, engine, tasks_at_once, compile)
    while True:
        try:
            names, found = _found(learner, tasks, engine, size, stacks, compile, autocast)
            return accumulate(names, found, engine)
        except Exception as error:  # whatever a module raises
            if size == 1 or not out_of_memory(error):
                _explain(error, learner, tasks, engine)
                raise
        size = _fits[learner] = (size + 1) // 2
        warnings.warn(f"out of memory: {size} tasks at once from now on", RuntimeWarning, stacklevel=2)


def curve(
    learner: MetaLearner,
    tasks: Task,
    at_steps: Sequence[int],
    *,
    statistics: Statistics = "own",
    engine: str = "auto",
    tasks_at_once: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Query losses (tasks,) and outputs (tasks, examples, ...) after each of `at_steps` inner steps, ascending.

    statistics: see `Problem.query`.
    """
    return curve_at(learner, tasks, [(steps, statistics) for steps in at_steps], engine, tasks_at_once)


def curve_at(
    learner: MetaLearner,
    tasks: Task,
    points: Sequence[tuple[int, Statistics]],
    engine: str = "auto",
    tasks_at_once: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """`curve` at pairs of steps and statistics, ascending: tasks are adapted once for all of them."""
    engine, size, _ = _plan(learner, tasks, engine, tasks_at_once)
    problems = (ENGINES[engine](learner, chunk, evaluating=True) for chunk in chunks(tasks, size))
    try:
        return curves(problems, points)
    except Exception as error:
        _explain(error, learner, tasks, engine)
        raise


def _explain(error: Exception, learner: MetaLearner, tasks: Task, engine: str) -> None:
    """Raise `InputError` where an engine's error has a reason that can be told in words."""
    if isinstance(error, IndexError | RuntimeError):
        check_outputs(learner, tasks)  # the likeliest reason
    if engine == "loop" or isinstance(error, InputError) or out_of_memory(error):
        return
    if all(_works(learner, loop, task) for task in chunks(tasks, 1)):
        raise InputError(
            f"engine={engine!r} does not take this module, 'loop' does: {first_line(error)}"
        ) from error


def check_outputs(learner: MetaLearner, tasks: Task, ways: int | None = None) -> None:
    """Raise `InputError` where the model's output is narrower than the number of ways.

    ways: by default the largest label of the tasks and one; with floating targets nothing is checked.
    """
    targets = tasks.query.targets
    if targets.is_floating_point():
        return
    ways = int(targets.max()) + 1 if ways is None else ways
    task = one(tasks, 0)
    with torch.no_grad():
        outputs = learner.adapt(task.support, steps=0)(task.query.inputs)
    if outputs.dim() < 2 or outputs.shape[-1] < ways:
        raise InputError(
            f"the model's outputs have shape {tuple(outputs.shape)}, too narrow for {ways} ways: "
            f"its last layer needs at least {ways} outputs"
        )


def choose(learner: MetaLearner, tasks: Task, compile: bool = False) -> tuple[str, str]:
    """The name of the engine for this learner and these tasks, and the reason in one line.

    A rule and no probe: engines round differently, and a run must end the same however busy the machine was.
    Measured on a CPU: vmap makes grouped convolutions of convolutions, 2.5-3.3 times slower than the loop on
    Conv4, but on small strided ones the loop's overhead weighs more (2 times slower). Compiled, both take fused
    kernels, tasks side by side, and small convolutions are stacked without being grouped. The factored engine pays
    where few vectors go through wide Linear layers; other wide layers take the loop (1.3-1.8 times faster than vmap
    on a 784-256-10 MLP, second order and Reptile), or, compiled, vmap.
    """
    device = tasks.support.inputs.device.type
    if _is_convolutional(learner) and device == "cpu":
        flops = _flops(learner, tasks)
        how = ", compiled" if compile else ""
        if flops > 5e7 or not _tried(learner, tasks)[0]:
            return "loop", f"convolutions on a CPU, {flops / 1e6:.0f} million operations a task{how}"
        return "batched", f"small convolutions, {flops / 1e6:.0f} million operations a task{how}"
    vmaps, vectors = _tried(learner, tasks)
    if not vmaps:
        return "loop", "something in the model that vmap does not take"
    own = dict(learner.model.named_parameters())
    wide = [
        own[n] for n, rows in vectors.items() if min(own[n].shape) > 2 * rows or own[n].shape[1] > 8 * rows
    ]
    large = sum(
        w.numel() for w in wide
    )  # below 20 000 the bookkeeping costs more: 1.2 times on a 1-40-40-1 MLP
    if large > max(20_000, sum(own[n].numel() for n in learner.adapted) / 2):
        return (
            "factored",
            f"linear layers much wider than the {max(vectors.values())} vectors of a support set",
        )
    if device != "cpu":
        return "batched", f"one kernel for all tasks on {device}"
    if max(own[n].numel() for n in learner.adapted) > 100_000 and not compile:
        return "loop", "wide layers on a CPU, which the factored engine does not take here"
    return "batched", "dense layers, compiled" if compile else "small dense layers"


def _plan(
    learner: MetaLearner, tasks: Task, engine: str, tasks_at_once: int | None, compile: bool = False
) -> tuple[str, int, bool]:
    """The engine's name, how many tasks to compute at once, and whether convolutions are to be stacked when compiled;
    remembered for the shapes of the tasks.
    """
    inputs = tasks.support.inputs
    shapes = inputs.shape, tasks.query.inputs.shape, inputs.device
    asked = engine, tasks_at_once, compile, *shapes, torch.get_num_threads()
    plans = _plans.setdefault(learner, {})
    plan = plans.get(asked)
    if plan is None:
        if engine == "auto":
            engine, _ = choose(learner, tasks, compile)
        elif engine not in ENGINES:
            raise InputError(f"unknown engine {engine!r}; there are: auto, {', '.join(ENGINES)}")
        stacks = (
            compile and engine == "batched" and inputs.device.type == "cpu" and _is_convolutional(learner)
        )
        plan = plans[asked] = engine, _at_once(learner, tasks, engine, tasks_at_once, compile), stacks
    engine, size, stacks = plan
    return engine, min(size, _fits.get(learner, size)) if _fits else size, stacks


_plans: WeakKeyDictionary[MetaLearner, dict[tuple, tuple[str, int, bool]]] = WeakKeyDictionary()
_fits: WeakKeyDictionary[MetaLearner, int] = WeakKeyDictionary()


def _at_once(learner: MetaLearner, tasks: Task, engine: str, tasks_at_once: int | None, compile: bool) -> int:
    """How many tasks to compute at once, where they fit into memory."""
    if tasks_at_once is not None:
        positive("tasks_at_once", tasks_at_once, integer=True)
    if engine == "loop":
        return 1
    if tasks_at_once is not None:
        return min(tasks_at_once, count(tasks))
    if count(tasks) > 8 and tasks.support.inputs.device.type == "cpu":
        if _is_convolutional(learner):
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
    if _flops(learner, tasks) < least_flops:
        return number
    enough = min(most, number // torch.get_num_threads())
    return next((few for few in range(enough, most // 2 - 1, -1) if number % few == 0), number)


def _found(learner, tasks, engine, size, stacks, compile, autocast) -> tuple[Sequence[str], Iterator[Found]]:
    """The names of the gradients, and what `differentiate` finds chunk by chunk."""
    ways = None
    if learner.start is not None and not tasks.support.targets.is_floating_point():
        ways = int(tasks.support.targets.max()) + 1
    device, number = tasks.support.inputs.device.type, count(tasks)

    def find(chunk: Task, engine: str = engine) -> Found:
        with torch.autocast(device, autocast) if autocast is not None else nullcontext():
            return differentiate(learner, ENGINES[engine](learner, chunk, ways=ways), number)

    if compile:
        size = next(n for n in range(size, 0, -1) if number % n == 0)  # one shape, compiled once
        alone = partial(find, engine="loop") if stacks else None
        side_by_side = size < number and size * torch.get_num_threads() <= number
        facts = (engine, ways, autocast, number)
        function = trace.function(learner, next(chunks(tasks, size)), find, facts, alone, side_by_side)
        if function is not None:
            return function.names, function.map(chunks(tasks, size))
    return list(learner.meta_parameters()), map(find, chunks(tasks, size))


def _tried(learner: MetaLearner, tasks: Task) -> tuple[bool, dict[str, int]]:
    """Whether vmap takes the learner, and, where the factored engine does, how many vectors of a support set go
    through each Linear weight; found out on two tasks, once per learner.
    """
    if learner not in _known:
        pair = next(chunks(tasks, 2))
        vmaps = _works(learner, batched, pair) is not None
        problem = _works(learner, factored, pair) if vmaps and factored.refusal(learner) is None else None
        _known[learner] = vmaps, {} if problem is None else factored.rows(problem)
    return _known[learner]


_known: WeakKeyDictionary[MetaLearner, tuple[bool, dict[str, int]]] = WeakKeyDictionary()


def _works(learner: MetaLearner, engine, tasks: Task) -> Problem | None:
    """A problem of this engine whose gradient could be computed, if it could."""
    try:
        with fork_rng(devices=[]):
            differentiate(learner, engine.problem(learner, tasks), count(tasks))
            return engine.problem(learner, tasks)
    except Exception:  # whatever a module raises
        return None


def _flops(learner: MetaLearner, tasks: Task) -> int:
    """The floating-point operations of the model on one task's query set."""
    # whatever fails, such as the loss of too few outputs, fails again where it is told in words
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        fork_rng(devices=[]),
        suppress(Exception),
    ):
        problem = loop.problem(learner, next(chunks(tasks, 1)))
        problem.query(problem.start)
    return counter.get_total_flops()


def _is_convolutional(learner: MetaLearner) -> bool:
    return any(isinstance(m, nn.modules.conv._ConvNd) for m in learner.model.modules())
