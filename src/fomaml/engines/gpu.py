"""The rule that chooses an engine elsewhere than on a CPU, from what a task asks of the device.

With F operations of a task in an inner step, L launches of t seconds each, a peak of P operations a second and the
share e of it that a stacked kernel reaches: one task after the other takes L·t a step where it is launches that count,
a stack F / (e·P) a task. So stacking wins where F < e·P·L·t, and about L·t·P / F tasks at once hide the launches: more
of them take memory and no less time.

The numbers below are from data sheets and from what such launches are known to take. **They were not measured**: there
was no GPU. `python -m benchmarks.gpu` measures each of them and writes it beside what stands here.
"""

from __future__ import annotations

import math

from fomaml.engines.probes import is_convolutional, work
from fomaml.learning.learner import MetaLearner
from fomaml.tasks import Task, count, device_of

PEAK = {"cuda": 2e13, "mps": 4e12}  # operations a second in float32, of an A100 and of an M2 Max
LAUNCH = {
    False: 8e-6,
    True: 1e-6,
}  # seconds of a launch from Python, and of one that is compiled and replayed
# of the peak: vmap makes grouped convolutions of convolutions, and batched products of products
SHARE_OF_CONVOLUTIONS, SHARE_OF_PRODUCTS = 0.05, 0.5
STEP = 3  # a forward and a backward pass are so many forward passes
FACTORED = 4_000_000  # numbers in the wide weights of all tasks, from which on the factored engine pays


def hidden(learner: MetaLearner, tasks: Task, compile: bool) -> float:
    """How many tasks a device computes at its peak while the launches of one step are made: L·t·P / F."""
    operations, launches = work(learner, tasks)
    peak = PEAK.get(device_of(tasks).type, PEAK["cuda"])
    return STEP * launches * LAUNCH[compile] * peak / max(1, STEP * operations)


def choose(learner: MetaLearner, tasks: Task, wide: int, rows: int, compile: bool) -> tuple[str, str]:
    """The engine for a learner that vmap takes, and why.

    wide: the numbers in Linear weights that the factored engine would keep in factors, if they are most of all.
    rows: the vectors of a support set.
    """
    if count(tasks) * wide > FACTORED:
        millions = count(tasks) * wide / 1e6
        return (
            "factored",
            f"{millions:.0f} million numbers in layers wider than the {rows} vectors of a support set",
        )
    share = SHARE_OF_CONVOLUTIONS if is_convolutional(learner) else SHARE_OF_PRODUCTS
    device = device_of(tasks).type
    if share * hidden(learner, tasks, compile) > 1:
        return "batched", f"launches on {device} take longer than what a task computes"
    return "loop", f"a single task keeps {device} busy"


def at_once(learner: MetaLearner, tasks: Task, number: int, engine: str, compile: bool) -> int:
    """How many of `number` tasks to compute at once: as many as hide the launches, of the factored engine all."""
    if engine != "batched":
        return number
    return min(number, max(1, math.ceil(hidden(learner, tasks, compile))))
