"""The algorithms of the command line: an entry for each says what it is made of, what suits it and what does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fomaml.app.settings import Kind
from fomaml.learning import algorithms as family
from fomaml.learning.learner import MetaLearner


@dataclass(frozen=True)
class Algorithm:
    """An algorithm, to be chosen by name.

    make: (model, inner_lr, inner_steps, criterion, **choices) → the learner.
    title: how tables call it.
    head: what `make` is told as its `head`, the name of the model's last Linear layer in the place of {}; None where it
        has no such argument.
    any_ways: its head is made of the classes of a task, so their number may change; it needs classes.
    adapts_head: the head takes part in the inner loop, so the head of a classifier may begin at zero.
    models: the networks it goes with, all where None.
    outer: the outer optimiser.
    defaults: by kind of task, what it takes for options that are not given; "choices" are further arguments of `make`.
    refuses: options that make no sense with it, each with the reason; "option=value" refuses one value alone.
    """

    make: Callable[..., MetaLearner]
    title: str
    head: str | None = None
    any_ways: bool = False
    adapts_head: bool = True
    models: tuple[str, ...] | None = None
    outer: Literal["adam", "sgd"] = "adam"
    defaults: Mapping[Kind, Mapping[str, Any]] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)


UNREACHED = "its meta-gradient does not reach the step sizes"
NO_QUERY_LOSS = "it has no query loss at each step"
NO_DERIVATIVE = "the derivative of Adam's step is of no use"
ELSEWHERE = "each task starts elsewhere than at the meta-parameters"
ALREADY = "it says itself what adapts"
SIGNED = "its steps go along the sign of the gradient"

# The defaults were found on short runs (sinusoid: 800 to 4 000 iterations; MNIST, new-labels, 1 shot: 80 to 150).
# On sinusoids Reptile with inner_lr 0.02 and 10 or more steps gave nan. MAML at FOMAML's meta_lr of 5e-3 on MNIST:
# 57 % instead of 81 %. CAVIA stayed at chance on MNIST with every inner_lr from 1 to 30, first and second order, with
# its context at the pixels or at a hidden layer.
ALGORITHMS: dict[str, Algorithm] = {
    "fomaml": Algorithm(family.FOMAML, "FOMAML"),
    "maml": Algorithm(
        family.MAML,
        "MAML",
        defaults={"classification": {"meta_lr": 1e-3}},
        refuses={"inner_optimizer": NO_DERIVATIVE},
    ),
    "reptile": Algorithm(
        family.Reptile,
        "Reptile",
        outer="sgd",  # whose step size is then the paper's ε
        defaults={
            "regression": {"inner_lr": 0.01, "inner_steps": 10, "meta_lr": 1.0},
            "classification": {"meta_lr": 1.0},
        },
        refuses={"learn_rates": UNREACHED, "multi_step_iterations": NO_QUERY_LOSS},
    ),
    "anil": Algorithm(
        family.ANIL,
        "ANIL",
        head="{}.*",
        defaults={
            "regression": {"inner_lr": 0.01, "inner_steps": 5},
            "classification": {"inner_lr": 0.2, "meta_lr": 1e-3},
        },
        refuses={"adapt": ALREADY},
    ),
    "boil": Algorithm(
        family.BOIL,
        "BOIL",
        head="{}.*",
        adapts_head=False,
        defaults={
            "regression": {"inner_lr": 0.01, "inner_steps": 5},
            "classification": {"inner_lr": 0.1, "meta_lr": 1e-3},
        },
        refuses={"adapt": ALREADY},
    ),
    "meta-sgd": Algorithm(
        family.MetaSGD,
        "Meta-SGD",
        defaults={
            "regression": {"inner_lr": 0.01, "inner_steps": 5},
            "classification": {"meta_lr": 1e-3},
        },
        refuses={"learn_rates": "it learns them anyway, elementwise", "inner_optimizer": NO_DERIVATIVE},
    ),
    "maml++": Algorithm(
        family.MAMLPlusPlus,
        "MAML++",
        defaults={
            "regression": {"inner_lr": 0.01, "inner_steps": 5},
            "classification": {"meta_lr": 1e-3},
        },
        refuses={"inner_optimizer": NO_DERIVATIVE},
    ),
    "imaml": Algorithm(
        family.iMAML,
        "iMAML",
        defaults={
            "regression": {
                "inner_lr": 0.005,
                "inner_steps": 16,
                "meta_lr": 3e-4,  # 1e-3: nan after 2500 to 3400 iterations
                "iterations": 10_000,  # more were not tried
                "choices": {"strength": 0.5, "cg_steps": 5, "damping": 100.0},  # undamped: nan after 1200
            },
            "classification": {
                "inner_steps": 10,
                "meta_lr": 1e-3,
                "choices": {"strength": 0.5, "cg_steps": 2},
            },
        },
        refuses={"learn_rates": UNREACHED, "multi_step_iterations": NO_QUERY_LOSS, "adapt": ALREADY},
    ),
    "cavia": Algorithm(
        family.CAVIA,
        "CAVIA",
        adapts_head=False,
        models=("mlp",),
        defaults={
            "regression": {"inner_lr": 1.0, "inner_steps": 1},  # the paper's
            "classification": {"inner_lr": 1.0},
        },
        refuses={"adapt": ALREADY, "inner_optimizer=carried-adam": ELSEWHERE},
    ),
    "sign-maml": Algorithm(
        family.SignMAML,
        "Sign-MAML",
        defaults={
            "regression": {"inner_lr": 0.003, "inner_steps": 10},
            "classification": {"inner_lr": 0.002},
        },
        refuses={"inner_optimizer": SIGNED, "inner_momentum": SIGNED},
    ),
    "zero-head": Algorithm(
        family.ZeroHeadMAML,
        "zero-head MAML",
        head="{}",
        any_ways=True,
        refuses={"inner_optimizer=carried-adam": ELSEWHERE},
    ),
    "proto-maml": Algorithm(
        family.ProtoMAML,
        "Proto-MAML",
        head="{}",
        any_ways=True,
        defaults={"classification": {"inner_lr": 0.01, "meta_lr": 1e-3}},  # 0.05: down to chance
        refuses={"inner_optimizer=carried-adam": ELSEWHERE},
    ),
}
ANY_WAYS = tuple(name for name, algorithm in ALGORITHMS.items() if algorithm.any_ways)
