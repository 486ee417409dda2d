"""What a machine has of memory, and the refusal of what cannot fit there, before anything is allocated."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from pathlib import Path

import torch

from fomaml.errors import InputError

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


def check_fits(what: str, needed: float, cure: str, device: str | torch.device | None = None) -> None:
    """Raise `InputError` where something needs more memory than the whole device has, by a lower bound of its bytes.

    what: is needed for, in words. cure: what to give instead. device: the CPU by default.
    """
    there = total(str(device or "cpu"))
    if there is not None and needed > there:
        place = "this machine" if str(device or "cpu").startswith(("cpu", "meta")) else f"the device {device}"
        raise InputError(
            f"{what} would take {in_units(needed)} of memory at least, and {place} has {in_units(there)}: {cure}"
        )


@functools.lru_cache(maxsize=8)
def total(device: str) -> int | None:
    """The bytes of memory of a device, of a CPU with its swap; None where nobody tells."""
    if device.startswith("cuda"):
        with contextlib.suppress(
            RuntimeError, AssertionError, ValueError
        ):  # no such device, which has its own message
            return torch.cuda.mem_get_info(torch.device(device))[1]
        return None
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    with contextlib.suppress(OSError):  # Linux
        if swap := re.search(r"^SwapTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M):
            found += 1024 * int(swap[1])
    return found if found > 0 else None


def in_units(number: float) -> str:
    """Bytes in words: 1.5 GB."""
    unit = 0
    while number >= 1000 and unit < len(UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {UNITS[unit]}"
