"""Weight norm by plain operations, where torch's kernel is wrong or unknown."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm


def written_out(module: nn.Module) -> dict[str, Any]:
    """The attributes with which a module computes its weight norm, old or new, by plain operations; else none."""
    kind = type(module)
    if kind.__module__ == "torch.nn.utils.parametrizations" and kind.__name__.endswith("WeightNorm"):
        dim = vars(module)["dim"]
        return {"forward": lambda g, v: _normed(v, g, dim)}
    hooks = vars(module)["_forward_pre_hooks"]
    old = {key: hook for key, hook in hooks.items() if isinstance(hook, WeightNorm)}
    if not old:
        return {}
    return {"_forward_pre_hooks": OrderedDict(hooks) | {key: _hook(hook) for key, hook in old.items()}}


def _hook(old: WeightNorm) -> Callable:
    def set_weight(module: nn.Module, inputs: Any) -> None:
        g, v = (getattr(module, f"{old.name}_{which}") for which in "gv")
        setattr(module, old.name, _normed(v, g, old.dim))

    return set_weight


def _normed(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """w = g v / ‖v‖ (Salimans and Kingma 2016, eq. 2), the norm over all axes but `dim`, or over all for -1."""
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]
    return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=dim != -1))
