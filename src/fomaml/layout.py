"""How the numbers of tensors lie in memory. torch's fused optimisers take parameters, gradients and what they keep as
they lie there: where strides differ, they add to each number what is meant for another.
"""

from __future__ import annotations

import torch
from torch import Tensor

Strides = tuple[int, ...]


def laid(tensor: Tensor, strides: Strides) -> Tensor:
    """The same numbers with these strides; the tensor itself where it has them, is sparse, or they are of a parameter
    whose numbers share memory.
    """
    if tensor.layout is not torch.strided or tensor.stride() == strides or 0 in strides:
        return tensor
    found = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return found.copy_(tensor)


def has_gaps(tensor: Tensor) -> bool:
    """Whether its numbers do not fill a piece of memory, each once, in whatever order."""
    return tensor.layout is not torch.strided or tensor.stride() != torch.empty_like(tensor).stride()


def fills_its_memory(tensor: Tensor) -> bool:
    """Whether it is no part of something larger, which would be held as long as it is."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give what an optimiser keeps of each parameter the parameter's strides, which a file of weights does not hold."""
    for parameter, kept in getattr(optimizer, "state", {}).items():
        if isinstance(parameter, Tensor) and isinstance(kept, dict):  # one of the user's may keep anything
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    kept[name] = laid(value, parameter.stride())
