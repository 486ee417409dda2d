"""The outer loop's optimiser, one of torch: looked at, given its step sizes, and made fast."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fomaml.engines import _torch
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


class Steps:
    """The steps of an optimiser. Where `optimizer.step()` would call nothing but the fused kernel of an Adam on a CPU,
    it is the kernel alone: of few small tensors what torch does around it takes three times as long.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._kernel: Callable[..., None] | None = None
        self._hooks: list[Mapping] = []
        self._decoupled = False
        if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
            self._decoupled = _decouples(optimizer, optimizer.param_groups[0])
            with suppress(_torch.Missing):
                self._hooks = _torch.step_hooks(optimizer)
                self._kernel = _torch.fused_adam(self._decoupled)

    def take(self) -> None:
        """One step."""
        if self._kernel is None or not self._plain():
            self.optimizer.step()
            return
        try:
            for group in self.optimizer.param_groups:
                self._step(self._kernel, group)
        except _torch.Missing:  # of the first group
            self._kernel = None
            self.optimizer.step()

    def _plain(self) -> bool:
        """Whether a step is one of the kernel and nothing else."""
        # a scheduler of torch puts a step of its own in the optimiser's place; a scaler, what it is to divide by
        outside = vars(self.optimizer).keys() & {"step", "grad_scale", "found_inf"}
        return not outside and not any(self._hooks) and all(map(self._taken, self.optimizer.param_groups))

    def _taken(self, group: dict[str, Any]) -> bool:
        """Whether a group is one for the kernel: fused, of one dtype, on a CPU, with gradients, stepped before."""
        numbers = group["lr"], *group["betas"]
        kinds = {parameter.dtype for parameter in group["params"]}
        return (
            group["fused"] is True
            and _decouples(self.optimizer, group) == self._decoupled
            and not any(isinstance(number, Tensor) for number in numbers)
            and len(kinds) == 1
            and all(
                p.is_cpu
                and p in self.optimizer.state
                and p.grad is not None
                and p.grad.layout is torch.strided
                for p in group["params"]
            )
        )

    @torch.no_grad()
    def _step(self, kernel: Callable[..., None], group: dict[str, Any]) -> None:
        kept = [self.optimizer.state[parameter] for parameter in group["params"]]
        beta1, beta2 = group["betas"]
        kernel(
            [own["step"] for own in kept],
            group["params"],
            [parameter.grad for parameter in group["params"]],
            [own["exp_avg"] for own in kept],
            [own["exp_avg_sq"] for own in kept],
            [own["max_exp_avg_sq"] for own in kept] if group["amsgrad"] else [],
            beta1=beta1,
            beta2=beta2,
            **{name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")},
        )


def _decouples(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether weights decay beside the gradient; before torch 2.7 AdamW has no option that says so."""
    return group.get("decoupled_weight_decay", type(optimizer) is torch.optim.AdamW)


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
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for name, parameter in learner.meta_parameters().items():
        if not parameter.isfinite().all():
            raise InputError(f"the meta-parameter {name} is not finite before the first step")
        if id(parameter) in fused and has_gaps(parameter):
            raise InputError(
                f"a fused {type(optimizer).__name__} takes parameters as they lie in memory, where the numbers of "
                f"{name} have gaps between them: leave out fused=True, or make the parameter contiguous"
            )
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
    surplus = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
    if surplus:
        text = f"the optimiser holds {len(surplus)} tensors that are no parameters of the learner, and get no gradient"
        warnings.warn(f"{text}; the first has shape {tuple(surplus[0].shape)}", RuntimeWarning, stacklevel=3)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"{type(optimizer).__name__} asks for a closure, which train has not: use one that does not"
        )
