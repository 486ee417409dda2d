"""What a task contributes to the meta-loss: one scalar whose gradient by θ is the meta-gradient.

An objective is a callable of a `Problem` (algorithms.py), which is one task or a stack of tasks. It
returns an `Outcome`; the engines sum, differentiate and average.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor


class Outcome(NamedTuple):
    """scalar: (), summed over the tasks. query_losses: () or (tasks,) and query_outputs at φ_K, detached.

    support_losses: one (steps,) or (steps, tasks) tensor, the loss at the start of each inner step.
    """

    scalar: Tensor
    query_losses: Tensor
    query_outputs: Tensor
    support_losses: Tensor


@dataclass(frozen=True)
class QueryLoss:
    """L(φ_K; query): MAML, FOMAML, ANIL, BOIL, Meta-SGD (Finn et al. 2017, algorithm 1, line 8)."""

    def __call__(self, problem) -> Outcome:
        adapted, support_losses = run(problem)
        losses, outputs = problem.query(adapted)
        return Outcome(losses.sum(), losses.detach(), outputs.detach(), support_losses)


@dataclass(frozen=True)
class Displacement:
    """½‖θ - φ_K‖², φ_K held constant, whose gradient is θ - φ_K: Reptile (Nichol et al. 2018, algorithm 2)."""

    def __call__(self, problem) -> Outcome:
        adapted, support_losses = run(problem)
        constant = {name: value.detach() for name, value in adapted.items()}
        scalar = sum((problem.start[name] - value).square().sum() / 2 for name, value in constant.items())
        with torch.no_grad():
            losses, outputs = problem.query(constant)
        return Outcome(scalar, losses, outputs, support_losses)


def run(problem) -> tuple[dict[str, Tensor], Tensor]:
    """φ_K and the support losses by step; earlier φ are let go on the way."""
    adapted, losses = problem.start, []
    for adapted, loss in islice(problem.path(), problem.steps):
        losses.append(loss)
    return adapted, torch.stack(losses)
