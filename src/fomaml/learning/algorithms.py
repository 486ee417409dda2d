"""The family of gradient-based meta-learners: the published combinations of a `MetaLearner`'s choices, by name.

Every function takes the further arguments of `MetaLearner`, but for those that make the algorithm what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from fomaml.errors import InputError
from fomaml.learning.adapt import Sign
from fomaml.learning.contracts import Criterion
from fomaml.learning.learner import Choices, MetaLearner, select
from fomaml.learning.objectives import Displacement, Implicit, MultiStepLoss
from fomaml.learning.starts import PrototypeHead, ZeroContext, ZeroHead

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on

InnerLR = float | Mapping[str, float]


def FOMAML(
    model: nn.Module,
    inner_lr: InnerLR,
    inner_steps: int,
    criterion: Criterion | None = None,
    **choices: Unpack[Choices],
) -> MetaLearner:
    """First-order MAML: the query gradient at φ_K, second derivatives dropped (Finn et al. 2017, section 5.2)."""
    return MetaLearner(model, inner_lr=inner_lr, inner_steps=inner_steps, criterion=criterion, **choices)


def MAML(
    model: nn.Module,
    inner_lr: InnerLR,
    inner_steps: int,
    criterion: Criterion | None = None,
    **choices: Unpack[Choices],
) -> MetaLearner:
    """Second-order MAML: differentiates through the inner steps (Finn et al. 2017, algorithm 1)."""
    choices.setdefault("first_order", False)
    return FOMAML(model, inner_lr, inner_steps, criterion, **choices)


def Reptile(
    model: nn.Module,
    inner_lr: InnerLR,
    inner_steps: int,
    criterion: Criterion | None = None,
    **choices: Unpack[Choices],
) -> MetaLearner:
    """Reptile: the meta-gradient is θ - φ_K; an outer SGD's step size is then the paper's ε (Nichol et al.
    2018, algorithm 2). Its Omniglot setting: `optimizer=Adam(betas=(0, 0.999)), inner_batch_size=10`.
    """
    own = _joined(choices, objective=Displacement())
    return FOMAML(model, inner_lr, inner_steps, criterion, **own)


def ANIL(
    model: nn.Module,
    inner_lr: InnerLR,
    inner_steps: int,
    criterion: Criterion | None = None,
    *,
    head: str | Sequence[str] = "head*",
    **choices: Unpack[Choices],
) -> MetaLearner:
    """Almost no inner loop: only the head, a glob over parameter names, adapts (Raghu et al. 2020, section 4).

    First order unless `first_order=False`, which is the paper's.
    """
    own = _joined(choices, adapted=head)
    return FOMAML(model, inner_lr, inner_steps, criterion, **own)


def BOIL(
    model: nn.Module,
    inner_lr: InnerLR,
    inner_steps: int,
    criterion: Criterion | None = None,
    *,
    head: str | Sequence[str] = "head*",
    **choices: Unpack[Choices],
) -> MetaLearner:
    """Body only in the inner loop: all but the head, a glob over parameter names, adapt (Oh et al. 2021, eq. 2)."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    outside = select(names, head)
    own = _joined(choices, adapted=[name for name in names if name not in outside])
    return FOMAML(model, inner_lr, inner_steps, criterion, **own)


def MetaSGD(
    model: nn.Module,
    inner_lr: InnerLR,
    inner_steps: int = 1,
    criterion: Criterion | None = None,
    **choices: Unpack[Choices],
) -> MetaLearner:
    """Meta-SGD: a step size per parameter element, meta-learned along with θ (Li et al. 2017, algorithm 1).

    Second order as in the paper unless `first_order=True`.
    """
    own = _joined(choices, learn_rates="elementwise")
    return MAML(model, inner_lr, inner_steps, criterion, **own)


def MAMLPlusPlus(
    model: nn.Module,
    inner_lr: InnerLR,
    inner_steps: int,
    criterion: Criterion | None = None,
    *,
    multi_step_iterations: int,
    first_order_iterations: int = 0,
    **choices: Unpack[Choices],
) -> MetaLearner:
    """MAML++: learned per-layer per-step rates, multi-step loss annealed over `multi_step_iterations`, first
    order during the first `first_order_iterations` (Antoniou et al. 2019, section 4).

    Its other parts are choices outside the learner: `BatchNorm(policy="per-step", steps=inner_steps)`
    in the model, and `schedule=cosine(iterations)` in `train`. `first_order=True` keeps first order for good.
    """
    choices.setdefault("learn_rates", "per-step")
    choices.setdefault("objective", MultiStepLoss(multi_step_iterations))
    choices.setdefault("first_order", lambda iteration: iteration < first_order_iterations)
    return FOMAML(model, inner_lr, inner_steps, criterion, **choices)


def iMAML(
    model: nn.Module,
    inner_lr: InnerLR,
    inner_steps: int,
    criterion: Criterion | None = None,
    *,
    strength: float = 2.0,
    cg_steps: int = 5,
    damping: float = 0.0,
    **choices: Unpack[Choices],
) -> MetaLearner:
    """Implicit MAML: proximal inner problem of strength λ, implicit gradient (Rajeswaran et al. 2019, algorithm 1).

    `damping` keeps it stable where the inner loop ends short of its minimum, see `Implicit`.
    """
    own = _joined(choices, objective=Implicit(strength, cg_steps, damping))
    return FOMAML(model, inner_lr, inner_steps, criterion, **own)


def CAVIA(
    model: nn.Module,
    inner_lr: InnerLR,
    inner_steps: int,
    criterion: Criterion | None = None,
    *,
    context: str | Sequence[str] = "*context*",
    **choices: Unpack[Choices],
) -> MetaLearner:
    """First-order CAVIA: only the context parameters, a glob, adapt, from zero in every task (Zintgraf et al.
    2019, algorithm 1); all others are meta-learned. `models.WithContext` adds context to a model's inputs.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    own = _joined(choices, adapted=context, start=ZeroContext(tuple(select(names, context))))
    return FOMAML(model, inner_lr, inner_steps, criterion, **own)


def SignMAML(
    model: nn.Module,
    inner_lr: InnerLR,
    inner_steps: int,
    criterion: Criterion | None = None,
    **choices: Unpack[Choices],
) -> MetaLearner:
    """Sign-MAML: inner steps along the sign of the gradient, first order by nature (Fan et al. 2021, eq. 5)."""
    own = _joined(choices, optimizer=Sign())
    return FOMAML(model, inner_lr, inner_steps, criterion, **own)


def ZeroHeadMAML(
    model: nn.Module,
    inner_lr: InnerLR,
    inner_steps: int,
    criterion: Criterion | None = None,
    *,
    head: str = "head",
    **choices: Unpack[Choices],
) -> MetaLearner:
    """FOMAML from a head of zeros in every task, for any number of ways; `head` names an `nn.Linear` module."""
    own = _joined(choices, start=ZeroHead(head))
    return FOMAML(model, inner_lr, inner_steps, criterion, **own)


def ProtoMAML(
    model: nn.Module,
    inner_lr: InnerLR,
    inner_steps: int,
    criterion: Criterion | None = None,
    *,
    head: str = "head",
    **choices: Unpack[Choices],
) -> MetaLearner:
    """fo-Proto-MAML: FOMAML from a head made of the class prototypes of the support set, for any number of ways
    (Triantafillou et al. 2020, section 3.2); `head` names an `nn.Linear` module.
    """
    own = _joined(choices, start=PrototypeHead(head))
    return FOMAML(model, inner_lr, inner_steps, criterion, **own)


def _joined(choices: Choices, **own: Unpack[Choices]) -> Choices:
    """The choices given, and those that make the algorithm what it is.

    Raises:
        InputError: one of these was given too.
    """
    for name in choices.keys() & own.keys():
        raise InputError(f"{name} is what makes this algorithm, and cannot be given; give it to FOMAML")
    return {**choices, **own}
