"""The family of gradient-based meta-learners: the published combinations of a `MetaLearner`'s choices, by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from fomaml.learning.adapt import Sign
from fomaml.learning.learner import Criterion, MetaLearner, select
from fomaml.learning.objectives import Displacement, Implicit, MultiStepLoss
from fomaml.learning.starts import PrototypeHead, ZeroContext, ZeroHead


def FOMAML(
    model: nn.Module, inner_lr, inner_steps: int, criterion: Criterion = F.cross_entropy, **choices
) -> MetaLearner:
    """First-order MAML: the query gradient at φ_K, second derivatives dropped (Finn et al. 2017, section 5.2)."""
    return MetaLearner(model, inner_lr=inner_lr, inner_steps=inner_steps, criterion=criterion, **choices)


def MAML(model, inner_lr, inner_steps: int, criterion: Criterion = F.cross_entropy, **choices) -> MetaLearner:
    """Second-order MAML: differentiates through the inner steps (Finn et al. 2017, algorithm 1)."""
    return FOMAML(model, inner_lr, inner_steps, criterion, **{"first_order": False, **choices})


def Reptile(
    model, inner_lr, inner_steps: int, criterion: Criterion = F.cross_entropy, **choices
) -> MetaLearner:
    """Reptile: the meta-gradient is θ - φ_K; an outer SGD's step size is then the paper's ε (Nichol et al.
    2018, algorithm 2). Its Omniglot setting: `optimizer=Adam(betas=(0, 0.999)), inner_batch_size=10`.
    """
    return FOMAML(model, inner_lr, inner_steps, criterion, objective=Displacement(), **choices)


def ANIL(
    model, inner_lr, inner_steps: int, criterion: Criterion = F.cross_entropy, *, head="head*", **choices
) -> MetaLearner:
    """Almost no inner loop: only the head, a glob over parameter names, adapts (Raghu et al. 2020, section 4).

    First order unless `first_order=False`, which is the paper's.
    """
    return FOMAML(model, inner_lr, inner_steps, criterion, adapted=head, **choices)


def BOIL(
    model, inner_lr, inner_steps: int, criterion: Criterion = F.cross_entropy, *, head="head*", **choices
) -> MetaLearner:
    """Body only in the inner loop: all but the head, a glob over parameter names, adapt (Oh et al. 2021, eq. 2)."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    outside = select(names, head)
    body = [name for name in names if name not in outside]
    return FOMAML(model, inner_lr, inner_steps, criterion, adapted=body, **choices)


def MetaSGD(
    model, inner_lr, inner_steps: int = 1, criterion: Criterion = F.cross_entropy, **choices
) -> MetaLearner:
    """Meta-SGD: a step size per parameter element, meta-learned along with θ (Li et al. 2017, algorithm 1).

    Second order as in the paper unless `first_order=True`.
    """
    return MAML(model, inner_lr, inner_steps, criterion, learn_rates="elementwise", **choices)


def MAMLPlusPlus(
    model,
    inner_lr,
    inner_steps: int,
    criterion: Criterion = F.cross_entropy,
    *,
    multi_step_iterations: int,
    first_order_iterations: int = 0,
    **choices,
) -> MetaLearner:
    """MAML++: learned per-layer per-step rates, multi-step loss annealed over `multi_step_iterations`, first
    order during the first `first_order_iterations` (Antoniou et al. 2019, section 4).

    Its other parts are choices outside the learner: `BatchNorm(policy="per-step", steps=inner_steps)`
    in the model, and `schedule=cosine(iterations)` in `train`. `first_order=True` keeps first order for good.
    """
    choices = {
        "learn_rates": "per-step",
        "objective": MultiStepLoss(multi_step_iterations),
        "first_order": lambda iteration: iteration < first_order_iterations,
        **choices,
    }
    return FOMAML(model, inner_lr, inner_steps, criterion, **choices)


def iMAML(
    model,
    inner_lr,
    inner_steps: int,
    criterion: Criterion = F.cross_entropy,
    *,
    strength: float = 2.0,
    cg_steps: int = 5,
    damping: float = 0.0,
    **choices,
) -> MetaLearner:
    """Implicit MAML: proximal inner problem of strength λ, implicit gradient (Rajeswaran et al. 2019, algorithm 1).

    `damping` keeps it stable where the inner loop ends short of its minimum, see `Implicit`.
    """
    objective = Implicit(strength, cg_steps, damping)
    return FOMAML(model, inner_lr, inner_steps, criterion, objective=objective, **choices)


def CAVIA(
    model,
    inner_lr,
    inner_steps: int,
    criterion: Criterion = F.cross_entropy,
    *,
    context="*context*",
    **choices,
) -> MetaLearner:
    """First-order CAVIA: only the context parameters, a glob, adapt, from zero in every task (Zintgraf et al.
    2019, algorithm 1); all others are meta-learned. `models.WithContext` adds context to a model's inputs.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    start = ZeroContext(tuple(select(names, context)))
    return FOMAML(model, inner_lr, inner_steps, criterion, adapted=context, start=start, **choices)


def SignMAML(
    model, inner_lr, inner_steps: int, criterion: Criterion = F.cross_entropy, **choices
) -> MetaLearner:
    """Sign-MAML: inner steps along the sign of the gradient, first order by nature (Fan et al. 2021, eq. 5)."""
    return FOMAML(model, inner_lr, inner_steps, criterion, optimizer=Sign(), **choices)


def ZeroHeadMAML(
    model, inner_lr, inner_steps: int, criterion: Criterion = F.cross_entropy, *, head="head", **choices
) -> MetaLearner:
    """FOMAML from a head of zeros in every task, for any number of ways; `head` names an `nn.Linear` module."""
    return FOMAML(model, inner_lr, inner_steps, criterion, start=ZeroHead(head), **choices)


def ProtoMAML(
    model, inner_lr, inner_steps: int, criterion: Criterion = F.cross_entropy, *, head="head", **choices
) -> MetaLearner:
    """fo-Proto-MAML: FOMAML from a head made of the class prototypes of the support set, for any number of ways
    (Triantafillou et al. 2020, section 3.2); `head` names an `nn.Linear` module.
    """
    return FOMAML(model, inner_lr, inner_steps, criterion, start=PrototypeHead(head), **choices)
