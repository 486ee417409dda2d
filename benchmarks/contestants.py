"""The table of contestants: this project's engines and the peers, each a name and a way to make a run of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor

from benchmarks import by_hand, jax_peer, libraries
from benchmarks.workloads import Setup, Workload
from fomaml.engines import ENGINES, plan
from fomaml.learning.algorithms import FOMAML


@dataclass(frozen=True)
class Contestant:
    """make: Setup → (run, read): run() computes one meta-gradient to its end, read turns what it returned
    into tensors in the order of the model's parameters. compiled: the first run compiles. own: on this
    library's network instead of the plain torch.nn one. absence: why it may well not be installed.
    """

    make: Callable[[Setup], tuple[Callable[[], Any], Callable[[Any], list[Tensor]]]]
    ours: bool = False
    compiled: bool = False
    own: bool = False
    absence: str = ""


def contestants(workload: Workload) -> dict[str, Contestant]:
    """All that take part in a workload, by name."""
    return _engines(workload) | PEERS


PEERS = {
    "plain loop": Contestant(by_hand.loop),
    "compiled loop": Contestant(by_hand.compiled_loop, compiled=True),
    "vmap": Contestant(by_hand.vmapped),
    "compiled vmap": Contestant(by_hand.compiled_vmapped, compiled=True),
    "higher": Contestant(libraries.higher),
    "torchopt": Contestant(libraries.torchopt),
    "torchopt vmap": Contestant(libraries.torchopt_vmap),
    "iteryne": Contestant(libraries.iteryne),
    "parallel-metalearn sequential": Contestant(partial(libraries.parallel_metalearn, backend="sequential")),
    "parallel-metalearn vmap": Contestant(partial(libraries.parallel_metalearn, backend="vmap")),
    "learn2learn": Contestant(
        libraries.learn2learn,
        absence="the C files in its release 0.2.0 do not compile from Python 3.11 on (longintrepr.h)",
    ),
    "JAX vmap": Contestant(partial(jax_peer.run, over_tasks="vmap"), compiled=True),
    "JAX map": Contestant(partial(jax_peer.run, over_tasks="map"), compiled=True),
    "JAX loop": Contestant(partial(jax_peer.run, over_tasks="loop"), compiled=True),
}


def _engines(workload: Workload) -> dict[str, Contestant]:
    found = {}
    for engine in (*ENGINES, "auto"):
        for own in (False, True) if workload.own else (False,):
            for compiled in (False, True):
                name = " ".join(["fomaml", engine, *["own net"] * own, *["compiled"] * compiled])
                make = partial(_ours, engine=engine, own=own, compiled=compiled)
                found[name] = Contestant(make, ours=True, compiled=compiled, own=own)
    return found


def _ours(setup: Setup, engine: str, own: bool, compiled: bool):
    workload = setup.workload
    model = setup.own_model() if own else setup.model
    learner = FOMAML(model, workload.inner_lr, workload.steps, setup.criterion)

    @cache
    def own_plan():
        """Part of the first run, and kept as a training run keeps it."""
        return plan(learner, setup.tasks, engine=engine, compile=compiled)

    def run():
        return own_plan()(setup.tasks)

    return run, lambda result: list(result.gradients.values())
