"""The step sizes of the inner loop: numbers by parameter name, or learned along with θ."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from fomaml.errors import InputError, plain, positive

Rates = Mapping[str, "float | Tensor"]


def by_name(names: list[str], inner_lr: float | Mapping[str, float]) -> dict[str, float]:
    """One step size per name, out of one number or of numbers by glob, the first match counting.

    Numbers of numpy and of torch, without dimensions, are taken for what they are worth.

    Raises:
        InputError: a number that is not positive or not finite, or a name that no glob matches.
    """
    if not isinstance(inner_lr, Mapping):
        return dict.fromkeys(names, _size("inner_lr", inner_lr))
    rates = {}
    for name in names:
        matches = [rate for glob, rate in inner_lr.items() if fnmatchcase(name, glob)]
        if not matches:
            raise InputError(f"inner_lr names no step size for {name!r}; add '*' for all others")
        rates[name] = _size(f"inner_lr of {name}", matches[0])
    return rates


def _size(name: str, rate: float) -> float:
    number = plain(rate)
    if number == 0 and not isinstance(number, bool):
        raise InputError(
            f"{name} must be a positive finite number, got {number!r}; adapted=... names what is to adapt, "
            "and what it leaves out stays as it is"
        )
    return positive(name, number)


class ConstantRates(nn.Module):
    """The same step sizes at every step, not learned."""

    def __init__(self, sizes: Mapping[str, float]):
        super().__init__()
        self.sizes = dict(sizes)

    def forward(self, step: int) -> Rates:
        return self.sizes

    def learned(self) -> dict[str, nn.Parameter]:
        return {}


class LearnedRates(nn.Module):
    """Step sizes that are meta-parameters.

    Arguments:
        parameters: the adapted parameters by name.
        sizes: the initial step size by name.
        elementwise: one rate per element (Meta-SGD, Li et al. 2017, eq. 2) instead of one per tensor.
        steps: one set of rates per inner step (LSLR, Antoniou et al. 2019, section 4.3), the last one
            serving every later step; None: the same rates at every step.

    Shapes: per name (parameter shape) or (), with a leading axis (steps, …) where there are steps.
    """

    sizes: ClassVar[Mapping[str, float]] = {}  # those that are plain numbers: none

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        sizes: Mapping[str, float],
        *,
        elementwise: bool = False,
        steps: int | None = None,
    ):
        super().__init__()
        self.steps = None if steps is None else positive("steps", steps, integer=True)
        self.names = list(parameters)
        lead = () if self.steps is None else (self.steps,)
        for name, parameter in parameters.items():
            shape = lead + (tuple(parameter.shape) if elementwise else ())
            value = torch.full(shape, sizes[name], dtype=parameter.dtype, device=parameter.device)
            self.register_parameter(key(name), nn.Parameter(value))

    def forward(self, step: int) -> Rates:
        rates = self.learned()
        if self.steps is None:
            return rates
        return {name: rate[min(step, self.steps - 1)] for name, rate in rates.items()}

    def learned(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, key(name)) for name in self.names}


def key(name: str) -> str:
    """The name under which a module holds something of the parameter `name`: its own may hold no dot."""
    return name.replace(".", "/")
