"""From the operators of a traced function to loops and products: the order in which they run, and on what memory.

What is computed element by element is written into the loop that needs it, where one alone does. A view is another
look at memory. Products are torch's own. An operator that is not known here, one that writes or one that draws is left
to `torch.compile`'s backend.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fomaml.engines.compiled import loops
from fomaml.engines.compiled.loops import Loop
from fomaml.engines.compiled.operators import (
    ARITHMETIC,
    COMPARED,
    FILLED,
    GIVEN,
    METHODS,
    Product,
    arithmetic,
    compared,
    name_of,
)
from fomaml.engines.compiled.values import (
    TYPES,
    Buffer,
    Const,
    Leaf,
    Op,
    Pieces,
    Unknown,
    Value,
    dense,
    is_dense,
    leaf,
    leaves_of,
    order_of,
    seen,
    spread,
)

aten = torch.ops.aten


Step = Loop | Product


@dataclass
class Lowered:
    """A function as steps. arguments: dtype, shape and strides of each; results: where each is, as traced."""

    steps: list[Step] = field(default_factory=list)
    arguments: list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    results: list[Leaf] = field(default_factory=list)


def lowered(graph: GraphModule) -> Lowered:
    """A traced function as steps.

    Raises:
        Unknown: something in it is not known here.
    """
    return Lowering(graph).done


VIEWS = {
    "view.default", "_unsafe_view.default", "reshape.default", "expand.default", "transpose.int", "t.default",
    "permute.default", "select.int", "slice.Tensor", "unsqueeze.default", "squeeze.dim", "squeeze.dims",
    "squeeze.default", "alias.default", "detach.default",
}  # fmt: skip
SAME = {"clone.default", "contiguous.default", "lift_fresh_copy.default"}


class Lowering:
    """The steps so far, and what each node stands for. node: the present one."""

    def __init__(self, graph: GraphModule):
        self.done = Lowered()
        self.steps = self.done.steps
        self.values: dict[Node, Any] = {}
        self.node: Node
        self.uses: dict[Node, int] = {}
        nodes = list(graph.graph.nodes)
        # how often a value is read: by whom, through views
        for node in reversed(nodes):
            self.uses[node] = sum(self.uses[u] if self._through(u) else 1 for u in node.users)
        for node in nodes:
            self.node = node
            self._take(node)

    @staticmethod
    def _through(node: Node) -> bool:
        return name_of(node) in VIEWS | SAME

    def _take(self, node: Node) -> None:
        if node.op == "placeholder":
            self.values[node] = self._argument(node.meta["val"])
        elif node.op == "output":
            self._results(node.args[0])
        elif node.op == "call_function":
            value = self._value(node)
            if isinstance(value, (Op, Pieces)) and self.uses[node] > 1 and value.dtype != torch.bool:
                value = self.stored(value)
            self.values[node] = value
        else:
            raise Unknown(node.op)

    def _argument(self, like: Tensor) -> Leaf:
        if like.dtype not in TYPES or like.numel() == 0 or like.device.type != "cpu":
            raise Unknown(f"{like.dtype}")
        facts = like.dtype, tuple(like.shape), tuple(like.stride())
        self.done.arguments.append(facts)
        room = 1 + sum((size - 1) * step for size, step in zip(*facts[1:]))
        return leaf(Buffer(like.dtype, room, "given", len(self.done.arguments) - 1), *facts[1:])

    # --- values ---------------------------------------------------------------------------------------

    def of(self, part: Any, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> Value:
        """An argument of a node as a value, of this dtype and broadcast to this shape."""
        if isinstance(part, Node):
            value = self.values[part]
            if not isinstance(value, Value):
                raise Unknown("several results")
        elif isinstance(part, bool | int | float):
            value = Const((), dtype or torch.float32, part)
        else:
            raise Unknown(type(part).__name__)
        if dtype is not None and value.dtype != dtype:
            value = self.cast(value, dtype)
        if isinstance(value, Pieces) and shape != value.shape:
            value = self.stored(value)
        if shape is None or tuple(shape) == value.shape:
            return value
        if isinstance(value, Op) and math.prod(shape) > math.prod(value.shape):
            value = self.stored(value)  # computed once, not for each copy
        return spread(value, shape)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        if isinstance(value, Const):
            return Const(value.shape, dtype, value.value)
        if isinstance(value, Pieces):
            value = self.stored(value)
        return Op(value.shape, dtype, f"({TYPES[dtype]})({{0}})", (value,))

    def stored(self, value: Value, strides: Sequence[int] | None = None) -> Leaf:
        """A value in memory; strides: in this order alone."""
        if isinstance(value, Leaf) and (strides is None or value.strides == tuple(strides)):
            return value
        if strides is None:
            strides = _layout(value)
        out = self.room(value.dtype, value.shape, strides)
        self.store(out, value)
        return out

    def store(self, out: Leaf, value: Value) -> None:
        if not isinstance(value, Pieces):
            self.steps.append(loops.elementwise(out, value))
            return
        for place in range(out.shape[value.axis]):
            part = seen(out, lambda like, place=place: like.select(value.axis, place))
            empty = Const(part.shape, value.dtype, 0)
            self.store(part, value.at.get(place, empty))

    def room(self, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int] | None = None) -> Leaf:
        """A new tensor in memory."""
        strides = dense(shape, range(len(shape))) if strides is None else tuple(strides)
        if not is_dense(shape, strides) or not math.prod(shape):
            raise Unknown(f"gaps in memory {shape} {strides}")
        return leaf(Buffer(dtype, math.prod(shape)), shape, strides)

    def new(self) -> Leaf:
        """A new tensor for what the node gives, with the strides that it has in the trace."""
        like = self.node.meta["val"]
        return self.room(like.dtype, tuple(like.shape), tuple(like.stride()))

    # --- operators ------------------------------------------------------------------------------------

    def _value(self, node: Node) -> Any:
        target, arguments = node.target, node.args
        if target is operator.getitem:
            return self.values[arguments[0]][arguments[1]]
        like = node.meta["val"]
        if isinstance(like, Tensor) and (like.dtype not in TYPES or like.numel() == 0):
            raise Unknown(f"{like.dtype}")
        name = name_of(node)
        packet = name.partition(".")[0]
        if name in VIEWS:
            return self._view(node)
        if name in SAME:
            return self.of(arguments[0])
        if packet in FILLED:
            return Const(tuple(like.shape), like.dtype, FILLED[packet])
        if packet in GIVEN:
            fill = arguments[GIVEN[packet]]
            if not isinstance(fill, bool | int | float):
                raise Unknown("fill")
            return Const(tuple(like.shape), like.dtype, fill)
        if name in ARITHMETIC:
            return arithmetic(self, node, name)
        if packet in COMPARED:
            return compared(self, node, COMPARED[packet])
        if name not in METHODS:
            raise Unknown(name or str(target))
        return METHODS[name](self, like, *arguments, **node.kwargs)

    def _view(self, node: Node) -> Value:
        source, *others = node.args
        if any(isinstance(other, Node) for other in others):
            raise Unknown("a view by values")
        # of what has no data "unsafe" and "reshape" would copy
        view = (
            aten.view.default if name_of(node) in ("_unsafe_view.default", "reshape.default") else node.target
        )
        value = self.of(source)
        shape = tuple(node.meta["val"].shape)
        if isinstance(value, Op) and math.prod(shape) > math.prod(value.shape):
            value = self.stored(value)  # computed once, not for each copy

        def look(like: Tensor) -> Tensor:
            return view(like, *others, **node.kwargs)

        try:
            return seen(value, look)
        except RuntimeError:  # not of this order in memory
            pass
        contiguous = dense(value.shape, range(len(value.shape)))
        return seen(self.stored(value, contiguous), look)

    # --- results --------------------------------------------------------------------------------------

    def _results(self, parts: Sequence[Any]) -> None:
        claimed: set[int] = set()
        for place, part in enumerate(parts):
            like = part.meta["val"]
            strides = tuple(like.stride())
            value = self.of(part)
            whole = (
                isinstance(value, Leaf)
                and value.buffer.place == "inner"
                and id(value.buffer) not in claimed
                and value.strides == strides
                and value.offset == 0
                and math.prod(value.shape) == value.buffer.size
                and is_dense(value.shape, strides)
            )
            if not whole:
                fills = is_dense(value.shape, strides)  # not so a slice, or what is broadcast
                copied = self.room(value.dtype, value.shape, strides if fills else None)
                self.store(copied, value)
                value = copied
            assert isinstance(value, Leaf)
            value.buffer.place, value.buffer.number = "found", place
            claimed.add(id(value.buffer))
            self.done.results.append(value)


def _layout(value: Value) -> tuple[int, ...]:
    """The strides with which a value is best stored: in the order of what it is computed from."""
    full = [each for each in leaves_of(value) if each.shape == value.shape and 0 not in each.strides]
    orders = [tuple(order_of(each.strides)) for each in full]
    plain = tuple(range(len(value.shape)))
    order = max(orders, key=lambda each: (orders.count(each), each == plain)) if orders else plain
    return dense(value.shape, order)
