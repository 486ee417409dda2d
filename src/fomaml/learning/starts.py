"""Where adaptation starts, if not at θ: heads that do not depend on the number of ways, and context parameters.

A start, see contracts.py, is a callable (θ by name, problem) → φ₀ by name. `problem.ways` is the number of classes of
the task, and a Linear head takes as many outputs, whatever it had.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fomaml.errors import InputError
from fomaml.learning.adapt import not_autocast
from fomaml.learning.contracts import InnerProblem

UNREACHED = -1e4


@dataclass(frozen=True)
class ZeroHead:
    """Every task starts from a head of zeros, so the order of the labels cannot matter (Ye & Chao 2022).

    head: the name of the `nn.Linear` module that is the head. It is never meta-learned.
    """

    head: str = "head"

    def __call__(self, start: dict[str, Tensor], problem: InnerProblem) -> dict[str, Tensor]:
        weight, bias = _names(self.head, start)
        lead = start[weight].shape[:-2]
        zero = start[weight].new_zeros
        return {
            **start,
            weight: zero((*lead, problem.ways, start[weight].shape[-1])),
            bias: zero((*lead, problem.ways)),
        }


@dataclass(frozen=True)
class PrototypeHead:
    """Every task starts from the head of a prototypical network: weight 2 c_k, bias -‖c_k‖², with c_k the mean
    feature of the support examples of class k (Proto-MAML, Triantafillou et al. 2020, section 3.2).

    A class without a support example, as one that a group lacks, has no prototype: it is never predicted.

    head: the name of the `nn.Linear` module that is the head; what goes into it are the features. It is
    never meta-learned; the gradient reaches the body through the prototypes too.
    """

    head: str = "head"

    def __call__(self, start: dict[str, Tensor], problem: InnerProblem) -> dict[str, Tensor]:
        weight, bias = _names(self.head, start)
        features = problem.support_features(self.head).to(start[weight].dtype)  # (..., examples, features)
        classes = torch.arange(problem.ways, device=features.device)
        members = (problem.task.support.targets.unsqueeze(-1) == classes).to(features.dtype)
        sizes = members.sum(-2)  # (..., ways)
        with not_autocast(features.device.type):
            prototypes = members.mT @ features / sizes.clamp(min=1).unsqueeze(-1)  # (..., ways, features)
        lengths = prototypes.square().sum(-1)
        # finite, so that the loss of a query example of such a class is, and out of reach of what features do
        lacking = UNREACHED * (1 + lengths.detach().amax(-1, keepdim=True))
        return {**start, weight: 2 * prototypes, bias: torch.where(sizes > 0, -lengths, lacking)}


@dataclass(frozen=True)
class ZeroContext:
    """Context parameters start from zero in every task and are never meta-learned (CAVIA, Zintgraf et al. 2019)."""

    names: tuple[str, ...]

    def __call__(self, start: dict[str, Tensor], problem: InnerProblem) -> dict[str, Tensor]:
        return {**start, **{name: torch.zeros_like(start[name]) for name in self.names}}


def _names(head: str, start: dict[str, Tensor]) -> tuple[str, str]:
    names = f"{head}.weight", f"{head}.bias"
    for name in names:
        if name not in start:
            raise InputError(
                f"the head {head!r} must be an nn.Linear with a bias that adapts: no {name!r} does"
            )
    return names
