"""The batch statistics that a task meets on its way from θ to φ_K, which running ones are moved towards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fomaml.learning.replica import original
from fomaml.models import BatchNorm, Seen, is_moving

# By the layer's name, the inner step and the number of its call in this step: mean and variance, (channels,) each.
Met = Mapping[tuple[str, int, int], tuple[Tensor, Tensor]]


def met(model: nn.Module, seen: Sequence[Seen]) -> Met:
    """What a forward pass has seen, of the layers of this model that are moved."""
    names = {id(module): name for name, module in model.named_modules() if is_moving(module)}
    calls: Counter[tuple[str, int]] = Counter()
    found = {}
    for layer, step, mean, variance in seen:
        name = names.get(id(original(layer)))
        if name is not None:
            found[name, step, calls[name, step]] = mean, variance
            calls[name, step] += 1
    return found


def whole(found: Met, steps: int) -> Met:
    """What was met, if all of the way from θ to φ_K was; nothing of an objective that takes another."""
    return found if {step for _, step, _ in found} == {*range(steps + 1)} else {}


@torch.no_grad()
def move(model: nn.Module, statistics: Met, momentum: float = 0.1) -> None:
    """Move the running statistics of a model's layers towards these, one after the other."""
    for (name, step, _), (mean, variance) in statistics.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, BatchNorm)
        layer.update(step, mean, variance, momentum)
