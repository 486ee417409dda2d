"""The outer loop's optimiser, one of torch: looked at, given its step sizes, and made fast."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from fomaml.errors import InputError, plain
from fomaml.layout import has_gaps
from fomaml.learning.learner import MetaLearner


def fuse(optimizer: torch.optim.Optimizer, gradients: Iterable[Tensor]) -> None:
    """Have an optimiser of torch take its fused form, where it leaves the choice to torch and has not stepped yet."""
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW) or optimizer.state:
        return
    if all(group["fused"] is not None for group in optimizer.param_groups):
        return
    if any(gradient.layout is not torch.strided for gradient in gradients):
        return
    for group in optimizer.param_groups:
        free = group["fused"] is None and group["foreach"] is None and not group["differentiable"]
        taken = not isinstance(group["lr"], Tensor) and all(
            p.is_floating_point() and p.device.type in ("cpu", "cuda") and not has_gaps(p)
            for p in group["params"]
        )
        if free and taken:
            group["fused"] = True


def set_rates(optimizer: torch.optim.Optimizer, factor: float, iteration: int) -> None:
    """Set the step sizes to so much of those that the optimiser began with.

    Raises:
        InputError: a factor below 0, as of a schedule over fewer iterations, or one that is not finite.
    """
    factor = plain(factor)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
        raise InputError(
            f"the schedule gives {factor} at iteration {iteration}, expected a number of 0 or more"
        )
    for group in optimizer.param_groups:
        # "initial_lr" as torch's schedulers keep it: saved with the optimiser, so a run resumes with it
        first = group.setdefault("initial_lr", float(group["lr"]))
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(first * factor)
        else:
            group["lr"] = first * factor


def check_optimizer(optimizer: torch.optim.Optimizer, learner: MetaLearner) -> None:
    """Warn where an optimiser does not hold all meta-parameters.

    Raises:
        InputError: it is none, or holds none of them, one is not finite, its step needs a closure, or it is fused and
            would write between the numbers of one.
    """
    if not hasattr(optimizer, "param_groups"):
        raise InputError(
            f"the optimiser is one of torch.optim over learner.parameters(), got a {type(optimizer).__name__}"
        )
    for name, parameter in learner.meta_parameters().items():
        if not parameter.isfinite().all():
            raise InputError(f"the meta-parameter {name} is not finite before the first step")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in learner.meta_parameters().items() if id(parameter) not in held]
    number = len(learner.meta_parameters())
    if len(missing) == number:
        raise InputError(
            f"the optimiser holds none of the {number} meta-parameters, and so would train nothing: make it over "
            "learner.parameters()"
        )
    if missing:
        text = f"the optimiser does not hold {len(missing)} of the {number} meta-parameters, which stay as they are: "
        names = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        warnings.warn(text + names, RuntimeWarning, stacklevel=3)
    known = {id(parameter) for parameter in (*learner.parameters(), *learner.meta_parameters().values())}
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for name, parameter in learner.meta_parameters().items():
        if id(parameter) in fused and has_gaps(parameter):
            raise InputError(
                f"a fused {type(optimizer).__name__} takes parameters as they lie in memory, where the numbers of "
                f"{name} have gaps between them: leave out fused=True, or make the parameter contiguous"
            )
    surplus = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
    if surplus:
        text = f"the optimiser holds {len(surplus)} tensors that are no parameters of the learner, and get no gradient"
        warnings.warn(f"{text}; the first has shape {tuple(surplus[0].shape)}", RuntimeWarning, stacklevel=3)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"{type(optimizer).__name__} asks for a closure, which train has not: use one that does not"
        )
