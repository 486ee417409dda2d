"""Whether compiling a meta-gradient pays: the rule behind `compile="auto"`.

A rule and no race: it goes by numbers of operations, tensors, calls and threads, never by a clock, so that a run
decides the same however busy the machine is, and ends with the same bits.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fomaml.engines.common import groups
from fomaml.engines.probes import flops, has_images, is_convolutional
from fomaml.errors import InputError, positive, shown
from fomaml.learning.learner import MetaLearner
from fomaml.learning.objectives import MultiStepLoss
from fomaml.models import MLP
from fomaml.tasks import Batch, Task, count, count_of, device_of, one

Compile = bool | Literal["auto"]

# Seconds, as measured on two cores of an AMD EPYC (AVX-512) with torch 2.14, workloads A-G of the benchmarks.
OPERATION = 1 / 25e9  # on one thread
TENSOR = 0.25e-3  # what stands around the operations of one tensor in one pass, stacked by vmap
TENSOR_ALONE = 0.05e-3  # of one task
IN_LOOPS = (
    nn.Sequential, MLP, nn.Linear, nn.ReLU, nn.Sigmoid, nn.LayerNorm, nn.Softmax, nn.Flatten, nn.Unflatten, nn.Identity,
)  # fmt: skip


class Cost(NamedTuple):
    """Seconds, estimated. call: of an uncompiled meta-gradient. saved: of it when compiled. compiling: once."""

    call: float
    saved: float
    compiling: float

    @property
    def least(self) -> int:
        """From how many calls on compiling pays: when it has saved twice what it takes, as these are estimates."""
        return math.ceil(2 * self.compiling / self.saved)


def check_compile(compile: Compile) -> None:
    """Raise `InputError` for what is neither a truth value nor "auto"."""
    if not isinstance(compile, bool) and compile != "auto":
        raise InputError(f'compile is True, False or "auto", got {shown(compile)}')


def refusal(learner: MetaLearner, tasks: Batch, autocast: torch.dtype | None = None) -> str:
    """Why such a learner and such tasks run uncompiled however many calls there are; "" where they need not."""
    from fomaml.engines.compiled.cache import too_old  # what is compiled is loaded where it is asked for
    from fomaml.engines.cpu.build import NO_COMPILER, compiler

    device = device_of(tasks).type
    narrow = [p.dtype for p in learner.parameters() if p.dtype not in (torch.float32, torch.float64)]
    if isinstance(learner.objective, MultiStepLoss):
        return "the multi-step loss has other weights at every iteration"
    if callable(learner.first_order):
        return "the order changes while it trains"
    if not isinstance(tasks, Task) and len(groups(learner, tasks)) > 1:
        return "the tasks have several shapes"
    if device != "cpu":
        return f"on {device} only where compile=True asks for it"
    if narrow or autocast is not None:
        return f"it gains nothing in {autocast or narrow[0]}"
    if too_old():
        return f"torch {torch.__version__} is too old"
    return "" if compiler() else NO_COMPILER


def cost(learner: MetaLearner, tasks: Batch, engine: str) -> Cost:
    """What a call and compiling it take on a CPU with torch's number of threads.

    Measured, an uncompiled call and a compiled one: convolutions of images 3.5 and 1.3 s (C), 144 and 49 ms (D); a
    784-256-10 MLP 29 and 15 ms (A), a 1-40-40-1 one 2.9 and 0.3 ms (F), two transformer layers 262 and 114 ms (G). So
    a third to two thirds of convolutions are saved; of dense layers nearly all that stands around their operations,
    and little of these. The first calls took, with nothing in a cache, 2.0, 2.3, 2.1, 1.3 and 4.6 s, and 18 and 31 s of
    series, which go through torch's inductor, as do dense layers beside what loops are not written of.
    """
    number = count(tasks)
    if not isinstance(tasks, Task):
        tasks = groups(learner, tasks)[0].tasks
    order = 1 if learner.first_order else 2
    support, query = map(count_of, one(tasks, 0))
    share = learner.inner_steps * support / max(1, query)
    # a backward pass has twice the operations of a forward one
    arithmetic = (
        3 * flops(learner, tasks) * (1 + order * share) * number * OPERATION / torch.get_num_threads()
    )
    tensors = order * (sum(1 for _ in learner.parameters()) + len(learner.adapted) * learner.inner_steps)
    around = tensors * (TENSOR_ALONE * number if engine == "loop" else TENSOR)
    if has_images(learner):  # kernels of our own
        return Cost(arithmetic + around, (arithmetic + around) / 3, 1.5 + 0.015 * tensors)
    if is_convolutional(learner):
        compiling = 8 + 0.2 * tensors
    else:
        compiling = 1.3 + 0.025 * tensors if _in_loops(learner) else 3 + 0.06 * tensors
    return Cost(arithmetic + around, 0.1 * arithmetic + 0.9 * around, compiling)


def calls_within(seconds: float, learner: MetaLearner, tasks: Batch) -> int:
    """About how many uncompiled calls fit into a time, by the rule's own estimate and not by a clock."""
    return max(1, round(seconds / cost(learner, tasks, "batched").call))


def least(learner: MetaLearner, tasks: Batch, engine: str, autocast: torch.dtype | None) -> float:
    """From how many calls on compiling pays; without end where it cannot be."""
    return math.inf if refusal(learner, tasks, autocast) else cost(learner, tasks, engine).least


def pays(
    learner: MetaLearner,
    tasks: Batch,
    engine: str,
    autocast: torch.dtype | None,
    iterations: int | None,
    decided: bool | None = None,
) -> tuple[bool, str]:
    """Whether to compile, and why, in a part of a line.

    engine: of the uncompiled plan. iterations: how many calls there are in all. decided: what was, where a run goes on.
    """
    if iterations is not None:
        positive("iterations", iterations, integer=True)
    if decided is not None:
        return decided, "compiled as before" if decided else "not compiled, as before"
    if why := refusal(learner, tasks, autocast):
        return False, f"not compiled: {why}"
    enough = cost(learner, tasks, engine).least
    told = f"compiling pays from {enough} iterations on"
    if iterations is None:
        return False, f"not compiled: {told}, and how many there are is not known"
    return iterations >= enough, f"{'' if iterations >= enough else 'not compiled: '}{told}, of {iterations}"


def begin_kernels(learner: MetaLearner, tasks: Batch, stacked: bool = True) -> None:
    """Begin to build the kernels that such tasks need once they are compiled: a second or two, beside what comes before
    the kernels are called. stacked: see `build.library`.
    """
    from fomaml.engines.compiled.cache import too_old
    from fomaml.engines.cpu import build

    if has_images(learner) and device_of(tasks).type == "cpu" and not too_old():
        build.begin(str(next(learner.parameters()).dtype).removeprefix("torch."), stacked)


def _in_loops(learner: MetaLearner) -> bool:
    """Whether loops of this library are known to be written of all that the model computes."""
    judged = learner.loss is None and learner.criterion in (F.cross_entropy, F.mse_loss)
    return judged and all(type(module) in IN_LOOPS for module in learner.model.modules())
