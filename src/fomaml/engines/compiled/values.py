"""What the nodes of a traced function stand for while its loops are written: places in memory, and what is computed
from them element by element but not yet stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "long long",
    torch.bool: "bool",
}


class Unknown(Exception):
    """An operator, or a case of one, of which no loop is written."""


@dataclass(eq=False)
class Buffer:
    """Memory of one tensor. place: "inner" of what is needed for a while, "given" of an argument, "found" of a result.

    number: of the argument or result. size: in numbers.
    """

    dtype: torch.dtype
    size: int
    place: str = "inner"
    number: int = -1

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclass(eq=False)
class Value:
    """A tensor of this shape, which may not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(eq=False)
class Leaf(Value):
    """A tensor in memory. like: its strides and where in the buffer it begins, of a tensor without data."""

    buffer: Buffer
    like: Tensor

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.like.stride())

    @property
    def offset(self) -> int:
        return int(self.like.storage_offset())


@dataclass(eq=False)
class Const(Value):
    """The same number everywhere."""

    value: bool | int | float


@dataclass(eq=False)
class Op(Value):
    """Computed from values of the same shape, element by element. text: in C++, {0}, {1}, … in place of these."""

    text: str
    parts: tuple[Value, ...]


@dataclass(eq=False)
class Pieces(Value):
    """Zero but for slices along an axis, by their place."""

    axis: int
    at: dict[int, Value]


def leaf(buffer: Buffer, shape: Sequence[int], strides: Sequence[int]) -> Leaf:
    like = torch.empty_strided(tuple(shape), tuple(strides), dtype=buffer.dtype, device="meta")
    return Leaf(tuple(shape), buffer.dtype, buffer, like)


def seen(value: Value, view: Callable[[Tensor], Tensor]) -> Value:
    """A view of a value: of each tensor in memory that it is computed from.

    Raises:
        RuntimeError: the order in memory of one of these does not have it.
        Unknown: that is not known without memory.
    """
    if isinstance(value, Leaf):
        like = view(value.like)
        return Leaf(tuple(like.shape), value.dtype, value.buffer, like)
    if isinstance(value, Const):
        like = view(torch.empty(value.shape, dtype=value.dtype, device="meta"))
        return Const(tuple(like.shape), value.dtype, value.value)
    if isinstance(value, Op):
        parts = tuple(seen(part, view) for part in value.parts)
        return Op(parts[0].shape, value.dtype, value.text, parts)
    assert isinstance(value, Pieces)
    return _pieces_seen(value, view)


def _pieces_seen(value: Pieces, view: Callable[[Tensor], Tensor]) -> Pieces:
    """Where the view does but move their axis: else RuntimeError."""
    axis = value.axis
    whole = view(torch.empty(value.shape, dtype=value.dtype, device="meta"))
    step = math.prod(value.shape[axis + 1 :])
    now = [i for i in range(whole.dim()) if (whole.shape[i], whole.stride(i)) == (value.shape[axis], step)]
    if len(now) != 1:
        raise RuntimeError("their axis is no axis any more")

    def part(like: Tensor) -> Tensor:
        return view(like.unsqueeze(axis).expand(value.shape)).select(now[0], 0)

    at = {place: seen(piece, part) for place, piece in value.at.items()}
    return Pieces(tuple(whole.shape), value.dtype, now[0], at)


def spread(value: Value, shape: Sequence[int]) -> Value:
    """Broadcast to a shape."""
    shape = tuple(shape)
    if value.shape == shape:
        return value
    return seen(value, lambda like: like.expand(shape))


def leaves_of(value: Value) -> Iterator[Leaf]:
    if isinstance(value, Leaf):
        yield value
    elif isinstance(value, Op):
        for part in value.parts:
            yield from leaves_of(part)
    elif isinstance(value, Pieces):
        for part in value.at.values():
            yield from leaves_of(part)


def number(value: Any, dtype: torch.dtype) -> str:
    """A number in C++."""
    if dtype == torch.bool:
        return "true" if value else "false"
    if not dtype.is_floating_point:
        return f"{int(value)}LL"
    value = float(value)
    if value != value or value in (float("inf"), float("-inf")):
        name = '__builtin_nan("")' if value != value else "__builtin_inf()"
        return f"({TYPES[dtype]})({'-' if value == float('-inf') else ''}{name})"
    return f"({value!r}{'f' if dtype == torch.float32 else ''})"


def dense(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor without gaps whose axes lie in memory in this order, the outermost first."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis], step = step, step * max(1, shape[axis])
    return tuple(strides)


def order_of(strides: Sequence[int]) -> list[int]:
    """The axes, the outermost in memory first."""
    return sorted(range(len(strides)), key=lambda axis: (-strides[axis], axis))


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor fills its memory without gaps, and no element has the place of another."""
    step = 1
    for axis in reversed(order_of(strides)):
        if shape[axis] == 1:
            continue
        if strides[axis] != step:
            return False
        step *= shape[axis]
    return True
