"""One table of the family: each algorithm with its slow twin of reference.py, and where both must agree.

A new algorithm is one row of ALGORITHMS, and its slow loop in reference.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import nn

import reference
from fomaml.learning.adapt import SGD, Adam, Sign
from fomaml.learning.algorithms import (
    ANIL,
    BOIL,
    CAVIA,
    FOMAML,
    MAML,
    MAMLPlusPlus,
    MetaSGD,
    ProtoMAML,
    Reptile,
    SignMAML,
    ZeroHeadMAML,
    iMAML,
)
from fomaml.learning.objectives import MultiStepLoss
from zoo import MODULES, example

LR, STEPS = 0.2, 3
BY_NAME = {"*bias": 0.4, "*": 0.1}
MOMENTUM, NESTEROV = {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}
DECAY = {"momentum": 0.5, "weight_decay": 0.1}


def head(model) -> list[str]:
    """The names of the last Linear's parameters."""
    name = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    return [f"{name}.weight", f"{name}.bias"]


def body(model) -> list[str]:
    return [name for name in reference.learned(model) if name not in head(model)]


def rates(names, lr=LR):
    return dict.fromkeys(names, lr)


def rates_by_name(model):
    return {n: 0.4 if n.endswith("bias") else 0.1 for n in reference.learned(model)}


@dataclass(frozen=True)
class Algorithm:
    """learner: (model, criterion) → MetaLearner. slow: (model, task, criterion) → Answer of reference.py.

    factored: part of the message with which the factored engine refuses it. modules: which it goes with.
    """

    learner: Callable
    slow: Callable
    factored: str | None = None
    modules: Callable = lambda module: True


def with_everything(preset, slow, choices=None, slow_choices=None, factored=None):
    """The row of an algorithm that adapts all parameters with one step size."""
    return Algorithm(
        lambda m, c: preset(m, LR, STEPS, c, **(choices or {})),
        lambda m, t, c: slow(m, t, c, rates(reference.learned(m)), STEPS, **(slow_choices or {})),
        factored,
    )


def optimised(preset, slow, ours, theirs, factored="plain SGD"):
    return with_everything(preset, slow, {"optimizer": ours}, {"optimizer": theirs}, factored)


def signed(module) -> bool:
    """Not where gradients are zero but for rounding, as those of a bias before a norm: their sign is chance."""
    return module not in {"conv4", "conv4-strided", "batch-norm", "group-norm"}


def partly(preset, slow, names, factored=None):
    return Algorithm(
        lambda m, c: preset(m, LR, STEPS, c, adapted=names(m)),
        lambda m, t, c: slow(m, t, c, rates(names(m)), STEPS),
        factored,
    )


def by_name(preset, slow, factored=None):
    return Algorithm(
        lambda m, c: preset(m, BY_NAME, STEPS, c),
        lambda m, t, c: slow(m, t, c, rates_by_name(m), STEPS),
        factored,
    )


ADAM = {"betas": (0.7, 0.9), "eps": 1e-3}
# eps as large: without a gradient, as a bias before a batch norm, Adam magnifies its rounding errors
REPTILE_ADAM = {"betas": (0.0, 0.999), "eps": 1e-3}
FIRST, QUERY = "first order only", "query loss as objective"
MINI = ({"inner_batch_size": 3}, {"batch": 3})
ALGORITHMS = {
    "fomaml": with_everything(FOMAML, reference.fomaml),
    "maml": with_everything(MAML, reference.maml, factored=FIRST),
    "reptile": with_everything(Reptile, reference.reptile, factored=QUERY),
    "anil": partly(FOMAML, reference.fomaml, head),
    "anil-second": partly(MAML, reference.maml, head, FIRST),
    "boil": partly(FOMAML, reference.fomaml, body),
    "boil-second": partly(MAML, reference.maml, body, FIRST),
    "boil-reptile": partly(Reptile, reference.reptile, body, QUERY),
    "by-name": by_name(FOMAML, reference.fomaml),
    "by-name-second": by_name(MAML, reference.maml, FIRST),
    "fomaml-momentum": optimised(
        FOMAML, reference.fomaml, SGD(**MOMENTUM), partial(torch.optim.SGD, **MOMENTUM)
    ),
    "fomaml-nesterov": optimised(
        FOMAML, reference.fomaml, SGD(**NESTEROV), partial(torch.optim.SGD, **NESTEROV)
    ),
    "maml-momentum": with_everything(MAML, reference.maml, {"optimizer": SGD(**MOMENTUM)}, MOMENTUM, FIRST),
    "maml-nesterov": with_everything(MAML, reference.maml, {"optimizer": SGD(**NESTEROV)}, NESTEROV, FIRST),
    "maml-decay": with_everything(MAML, reference.maml, {"optimizer": SGD(**DECAY)}, DECAY, FIRST),
    "fomaml-adam": optimised(FOMAML, reference.fomaml, Adam(**ADAM), partial(torch.optim.Adam, **ADAM)),
    "fomaml-adamw": optimised(
        FOMAML,
        reference.fomaml,
        Adam(**ADAM, weight_decay=0.1, decoupled=True),
        partial(torch.optim.AdamW, **ADAM, weight_decay=0.1),
    ),
    "reptile-adam": optimised(
        Reptile, reference.reptile, Adam(**REPTILE_ADAM), partial(torch.optim.Adam, **REPTILE_ADAM)
    ),
    "sign-maml": replace(optimised(FOMAML, reference.fomaml, Sign(), reference.SignSGD), modules=signed),
    "fomaml-minibatch": with_everything(FOMAML, reference.fomaml, *MINI, "whole support set"),
    "maml-minibatch": with_everything(MAML, reference.maml, *MINI, FIRST),
    "reptile-minibatch": with_everything(Reptile, reference.reptile, *MINI, QUERY),
}


def head_row(preset, prototypes, **choices):
    """The row of an algorithm that starts from a head made for the task."""
    return Algorithm(
        lambda m, c: preset(m, LR, STEPS, c, head=head(m)[0].removesuffix(".weight"), **choices),
        lambda m, t, c: reference.from_head(
            m,
            t,
            c,
            LR,
            STEPS,
            head(m)[0].removesuffix(".weight"),
            int(t.support.targets.max()) + 1,
            prototypes,
            **choices,
        ),
        FIRST if choices else "starts at the meta-parameters",
        {"mlp", "conv4", "conv4-strided", "group-norm", "layer-norm", "batch-norm"}.__contains__,
    )


WEIGHTS = [(1 - 0.25) / STEPS] * (STEPS - 1) + [1 - (STEPS - 1) * (1 - 0.25) / STEPS]


def quarter_way(preset, *arguments, **choices):
    """A learner at the outer iteration 5 of 20."""

    def build(model, criterion):
        learner = preset(model, LR, STEPS, criterion, *arguments, **choices)
        learner.iteration = 5
        return learner

    return build


ALGORITHMS |= {
    "meta-sgd": Algorithm(
        lambda m, c: MetaSGD(m, LR, STEPS, c),
        lambda m, t, c: reference.learned_rates(m, t, c, LR, STEPS, elementwise=True, first_order=False),
        FIRST,
    ),
    "meta-sgd-first": Algorithm(
        lambda m, c: MetaSGD(m, LR, STEPS, c, first_order=True),
        lambda m, t, c: reference.learned_rates(m, t, c, LR, STEPS, elementwise=True, first_order=True),
        "learned ones",
    ),
    "lslr": Algorithm(
        lambda m, c: FOMAML(m, LR, STEPS, c, learn_rates="per-step"),
        lambda m, t, c: reference.learned_rates(m, t, c, LR, STEPS, elementwise=False, first_order=True),
        "learned ones",
    ),
    "multi-step": Algorithm(
        quarter_way(FOMAML, objective=MultiStepLoss(20)),
        lambda m, t, c: reference.multi_step(m, t, c, LR, STEPS, WEIGHTS),
        "query loss as objective",
    ),
    "maml++": Algorithm(
        quarter_way(MAMLPlusPlus, multi_step_iterations=20, first_order_iterations=5),
        lambda m, t, c: reference.learned_rates(
            m, t, c, LR, STEPS, elementwise=False, first_order=False, weights=WEIGHTS
        ),
        FIRST,
    ),
    "maml++-annealing": Algorithm(
        quarter_way(MAMLPlusPlus, multi_step_iterations=20, first_order_iterations=6),
        lambda m, t, c: reference.learned_rates(
            m, t, c, LR, STEPS, elementwise=False, first_order=True, weights=WEIGHTS
        ),
        FIRST,
    ),
    "zero-head": head_row(ZeroHeadMAML, False),
    "zero-head-second": head_row(ZeroHeadMAML, False, first_order=False),
    "proto-maml": head_row(ProtoMAML, True),
    "proto-maml-second": head_row(ProtoMAML, True, first_order=False),
    "sign-maml-preset": replace(
        with_everything(SignMAML, reference.fomaml, None, {"optimizer": reference.SignSGD}, "plain SGD"),
        modules=signed,
    ),
    "anil-preset": Algorithm(
        lambda m, c: ANIL(m, LR, STEPS, c, head=head(m)),
        lambda m, t, c: reference.fomaml(m, t, c, rates(head(m)), STEPS),
    ),
    "boil-preset": Algorithm(
        lambda m, c: BOIL(m, LR, STEPS, c, head=head(m)),
        lambda m, t, c: reference.fomaml(m, t, c, rates(body(m)), STEPS),
        modules=lambda module: module != "twins",
    ),
    "imaml": Algorithm(
        lambda m, c: iMAML(m, LR, STEPS, c, strength=5.0, cg_steps=60),
        lambda m, t, c: reference.imaml(m, t, c, LR, STEPS, 5.0),
        "query loss as objective",
        {"layer-norm", "regression"}.__contains__,
    ),
    "imaml-damped": Algorithm(
        lambda m, c: iMAML(m, LR, STEPS, c, strength=2.0, cg_steps=60, damping=4.0),
        lambda m, t, c: reference.imaml(m, t, c, LR, STEPS, 2.0, damping=4.0),
        "query loss as objective",
        {"layer-norm", "regression"}.__contains__,
    ),
    "cavia": Algorithm(
        lambda m, c: CAVIA(m, LR, STEPS, c),
        lambda m, t, c: reference.cavia(m, t, c, LR, STEPS, "context"),
        "starts at the meta-parameters",
        {"context"}.__contains__,
    ),
    "cavia-second": Algorithm(
        lambda m, c: CAVIA(m, LR, STEPS, c, first_order=False),
        lambda m, t, c: reference.cavia(m, t, c, LR, STEPS, "context", first_order=False),
        FIRST,
        {"context"}.__contains__,
    ),
}

EXECUTIONS = {
    "loop": {"engine": "loop"},
    "batched": {"engine": "batched"},
    "batched-2": {"engine": "batched", "tasks_at_once": 2},
    "factored": {"engine": "factored"},
    "factored-2": {"engine": "factored", "tasks_at_once": 2},
}
# in chunks of tasks: every algorithm on a few modules, a few algorithms on every module
CHUNKED = ({"mlp", "conv4-strided", "user", "twins"}, {"fomaml", "maml", "reptile"})
CASES = [
    (algorithm, module, execution)
    for algorithm in ALGORITHMS
    for module in filter(ALGORITHMS[algorithm].modules, MODULES)
    for execution, options in EXECUTIONS.items()
    if "tasks_at_once" not in options or module in CHUNKED[0] or algorithm in CHUNKED[1]
]
EXACT = {("fomaml", "mlp"), ("fomaml", "conv4"), ("fomaml", "user")}


@cache
def answer(algorithm, module, **sizes):
    model, tasks, criterion = example(module, **sizes)
    return reference.over_tasks(lambda m, t: ALGORITHMS[algorithm].slow(m, t, criterion), model, tasks)


def error(found: dict, expected: dict) -> float:
    """The largest difference of any entry, relative to the largest entry of all."""
    assert found.keys() == expected.keys()
    scale = max(e.abs().max().item() for e in expected.values())
    assert scale > 1e-6
    return max((found[n] - e).abs().max().item() for n, e in expected.items()) / scale


def assert_agrees(result, expected, tolerance=1e-10):
    assert all(gradient.is_contiguous() for gradient in result.gradients.values())  # as the parameters are
    assert error(result.gradients, expected.gradients) <= tolerance
    for name in ("query_losses", "support_losses", "query_outputs"):
        assert error({name: getattr(result, name)}, {name: getattr(expected, name)}) <= tolerance
