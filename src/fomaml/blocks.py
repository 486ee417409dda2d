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
        self._sizes: defaultdict[int, _Blocks] = defaultdict(_Blocks)

    def begin(self) -> None:
        """From now on no more blocks are kept than are lent from now on: what is held already is held by somebody who
        may hold any number, and need not be kept when it comes back.
        """
        for blocks in self._sizes.values():
            blocks.before = len(blocks.lent)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU; its memory comes back when it and all its views are gone."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        block, offset = self._sizes[size].lend(size)
        return torch.frombuffer(block, dtype=dtype, count=count, offset=offset).view(shape)

    @property
    def kept(self) -> int:
        """The bytes that nobody holds."""
        return sum(block.nbytes for blocks in self._sizes.values() for block, _ in blocks.free)


class _Blocks:
    """Those of one size, each with where its aligned part begins.

    most: so many were lent at once, beyond those that were lent `before`; no more are kept.
    """

    def __init__(self) -> None:
        self.free: list[tuple[np.ndarray, int]] = []
        self.lent: set[int] = set()  # ids: a set takes no lock where a number would
        self.before = self.most = 0

    def lend(self, size: int) -> tuple[_Lent, int]:
        if self.free:
            block, offset = self.free.pop()
        else:
            block = np.empty(size + ALIGNMENT, np.uint8)
            offset = -block.ctypes.data % ALIGNMENT
        self.lent.add(id(block))
        self.most = max(self.most, len(self.lent) - self.before)
        lent = block.view(_Lent)
        lent.give_back = functools.partial(self.take_back, block, offset)
        return lent, offset

    def take_back(self, block: np.ndarray, offset: int) -> None:
        self.lent.discard(id(block))
        if len(self.free) < self.most:
            self.free.append((block, offset))


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
