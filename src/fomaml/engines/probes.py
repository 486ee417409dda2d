"""What is found out about a learner by trying it on a task or two: which engines take it, what a task costs, and
why it failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn
from torch.random import fork_rng
from torch.utils.flop_counter import FlopCounterMode

from fomaml.engines import batched, factored, loop
from fomaml.engines.common import Engine, differentiate, first_line, out_of_memory
from fomaml.errors import InputError
from fomaml.learning.learner import MetaLearner
from fomaml.learning.problem import Problem
from fomaml.tasks import Task, chunks, count, one

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def is_convolutional(learner: MetaLearner) -> bool:
    return any(isinstance(module, CONVOLUTIONS) for module in learner.model.modules())


def takers(learner: MetaLearner, tasks: Task) -> tuple[bool, dict[str, int]]:
    """Whether vmap takes the learner, and, where the factored engine does, how many vectors of a support set go
    through each Linear weight.
    """
    with _as_for_a_gradient(tasks, 2) as pair:
        vmaps = _taken(learner, batched.problem, pair) is not None
        if not vmaps or factored.refusal(learner) is not None:
            return vmaps, {}
        problem = _taken(learner, factored.problem, pair)
        return vmaps, factored.rows(problem) if isinstance(problem, factored.FactoredProblem) else {}


def try_once(learner: MetaLearner, tasks: Task) -> None:
    """The model and the criterion on one task as it is: raises `InputError` for what they return, as `Problem` does.

    Within vmap values are not known, and so not all of it can be seen.
    """
    with _as_for_a_gradient(tasks, 1) as single, torch.no_grad():
        problem = loop.problem(learner, single)
        try:
            problem.query(problem.start)
        except InputError:
            raise
        except Exception:  # whatever a module raises, it raises again where it is explained
            return


def flops(learner: MetaLearner, tasks: Task) -> int:
    """The floating-point operations of the model on one task's query set."""
    # whatever fails, such as the loss of too few outputs, fails again where it is told in words
    with (
        _as_for_a_gradient(tasks, 1) as single,
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        suppress(Exception),
    ):
        problem = loop.problem(learner, single)
        problem.query(problem.start)
    return counter.get_total_flops()


@contextmanager
def _as_for_a_gradient(tasks: Task, number: int) -> Iterator[Task]:
    """The first tasks, in the modes in which a meta-gradient is computed, whatever the caller's are; random numbers
    are drawn as if nothing had happened.
    """
    device = tasks.support.inputs.device
    with (
        fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        few = next(chunks(tasks, number))
        yield few.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def _taken(learner: MetaLearner, engine: Engine, tasks: Task, always: bool = True) -> Problem | None:
    """A problem of this engine whose gradient could be computed, if it could; `always`: at every outer iteration."""
    try:
        problem = engine(learner, tasks)
        if always and callable(learner.first_order):
            problem.first_order = False  # the order that asks for more
        differentiate(learner, problem, count(tasks))
        return engine(learner, tasks)
    except Exception:  # whatever a module raises
        return None


def explain(error: Exception, learner: MetaLearner, tasks: Task, engine: str) -> None:
    """Raise `InputError` where an engine's error has a reason that can be told in words."""
    if isinstance(error, IndexError | RuntimeError):
        check_outputs(learner, tasks)  # the likeliest reason
    if engine == "loop" or isinstance(error, InputError) or out_of_memory(error):
        return
    with fork_rng(devices=[]):
        loop_does = all(_taken(learner, loop.problem, task, always=False) for task in chunks(tasks, 1))
    if loop_does:
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
