"""What operators of torch a function calls: how many, whether they draw random numbers, and their work."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from fomaml.engines._torch import Missing, find

OPERATOR = type(torch.ops.aten.relu.default)


def is_random(function: Any) -> bool:
    """Whether a function is an operator that draws random numbers, or does not tell."""
    tags = getattr(function, "tags", None)
    return isinstance(function, OPERATOR) if tags is None else torch.Tag.nondeterministic_seeded in tags


def watched() -> Watched:
    """A context that says of the operators called within it, in a trace too:

    random: whether one may have drawn random numbers. Those that are not torch's own count as such, as they can hide
    anything. calls: the number of those that compute something; flops: their floating-point operations; None where that
    is not known.
    """
    try:
        return _watching(find("torch.utils._python_dispatch:TorchDispatchMode"))()
    except (Missing, TypeError):
        return _Unknown()


class Watched(Protocol):
    random: bool
    calls: int | None
    flops: int | None

    def __enter__(self) -> Watched: ...

    def __exit__(self, *error: Any) -> None: ...


class _Unknown:
    random = True
    calls: int | None = None
    flops: int | None = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@functools.cache
def _formulas() -> dict:
    """How many operations an operator has. To have torch's own mode count them loads torch's compiler, for a second."""
    return FlopCounterMode(display=False).flop_registry


@functools.cache
def _watching(mode: type) -> type:
    class Watching(mode):
        supports_higher_order_operators = True

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # to be told to, torch loads its compiler as well

        def __init__(self):
            super().__init__()
            self.random, self.calls, self.flops = False, 0, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            own = getattr(function, "namespace", None) in ("aten", "prim")
            self.random = self.random or not own or is_random(function)
            self.calls += not getattr(function, "is_view", False)
            found = function(*args, **(kwargs or {}))
            formula = _formulas().get(getattr(function, "overloadpacket", None))
            if formula is not None:
                self.flops += formula(*args, **(kwargs or {}), out_val=found)
            return found

    return Watching
