"""Where a run is computed."""

from __future__ import annotations

import torch

from fomaml.engines._torch import cpu_has_bfloat16
from fomaml.errors import InputError


def check_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        InputError: no such device, or not on this machine.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise InputError(f"the device {name!r} computes nothing; try cpu, cuda or mps")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"the device {name!r} is not there: no CUDA device on this machine")
        torch.empty(0, device=device)
    except InputError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"the device {name!r} is not there; try cpu, cuda or mps") from None
    return device


def has_bfloat16(name: str) -> bool:
    """Whether a device is known to calculate in bfloat16. A CPU that has to imitate it takes thirty times as long as in
    float32 (convolutions on AVX2).
    """
    device = check_device(name)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_has_bfloat16()
