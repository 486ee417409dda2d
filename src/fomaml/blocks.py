"""Memory of tensors that nobody holds any more, for the next ones of the same size.

The system's own allocator gives large pieces back, and fresh pages cost more than what fills them.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

LARGE = 2**16  # bytes, from which on a tensor's memory is worth keeping
ALIGNMENT = 64


class Memory:
    """Blocks that come back when the tensors in them are gone."""

    def __init__(self):
        self._free: defaultdict[int, list[tuple[np.ndarray, int]]] = defaultdict(list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU; its memory comes back when it and all its views are gone."""
        count = math.prod(shape)
        free = self._free[count * dtype.itemsize]
        if free:
            block, offset = free.pop()
        else:
            block = np.empty(count * dtype.itemsize + ALIGNMENT, np.uint8)
            offset = -block.ctypes.data % ALIGNMENT
        lent = block.view(_Lent)
        lent.give_back = functools.partial(free.append, (block, offset))
        return torch.frombuffer(lent, dtype=dtype, count=count, offset=offset).view(shape)


class _Lent(np.ndarray):
    """A block while a tensor holds it."""

    give_back: Callable[[], None]

    def __del__(self):
        self.give_back()


_own = threading.local()


@contextmanager
def kept_in(memory: Memory) -> Iterator[None]:
    """Within it what `empty` gives to this thread comes of this memory."""
    before = getattr(_own, "memory", None)
    _own.memory = memory
    try:
        yield
    finally:
        _own.memory = before


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor to write into."""
    memory = getattr(_own, "memory", None)
    if memory is None or device.type != "cpu" or math.prod(shape) * dtype.itemsize < LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    return memory.empty(shape, dtype)
