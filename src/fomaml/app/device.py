"""Where a run is computed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

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


WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def reproducible(name: str) -> Iterator[None]:
    """Within it a GPU repeats its numbers as far as torch has it: algorithms of cuDNN that depend neither on chance nor
    on a race, and a workspace of cuBLAS of a fixed size, which stays set where it was not.

    name: of the device. On a CPU nothing has to be done.
    """
    if not name.startswith("cuda"):
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")  # read when cuBLAS begins
    own = torch.backends.cudnn
    before = own.deterministic, own.benchmark
    own.deterministic, own.benchmark = True, False
    try:
        yield
    finally:
        own.deterministic, own.benchmark = before


def device_facts(name: str) -> dict[str, Any]:
    """What a result depends on beside the machine, of a device that is not the CPU: what it is, whether products of
    float32 are computed with fewer digits (TF32), and whether it repeats them.
    """
    kind = name.partition(":")[0]
    if kind == "cpu":
        return {}
    facts: dict[str, Any] = {"device": name}
    if kind == "cuda":
        less = torch.get_float32_matmul_precision() != "highest"
        tf32 = {"matrix products": less, "convolutions": torch.backends.cudnn.allow_tf32}
        facts |= {
            "gpu": f"{torch.cuda.get_device_name(name)}, CUDA {torch.version.cuda}",
            "tf32": [what for what, used in tf32.items() if used],
            "deterministic": {
                "cudnn": torch.backends.cudnn.deterministic,
                "cublas_workspace": os.environ.get(WORKSPACE),
            },
        }
    return facts


def has_bfloat16(name: str) -> bool:
    """Whether a device is known to calculate in bfloat16. A CPU that has to imitate it takes thirty times as long as in
    float32 (convolutions on AVX2).
    """
    device = check_device(name)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_has_bfloat16()
