"""From the operators of a traced function to loops and products: the order in which they run, and on what memory.

What is computed element by element is written into the loop that needs it, where one alone does. A view is another
look at memory. Products are torch's own. An operator that is not known here, one that writes or one that draws is left
to `torch.compile`'s backend.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fomaml.engines import _torch
from fomaml.engines.compiled import loops
from fomaml.engines.compiled.loops import Loop
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


@dataclass
class Product:
    """A product of matrices by torch. name: of the operator. out: first of the operands."""

    name: str
    operands: list[Leaf]
    factors: tuple[float, ...] = ()


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
    return _Lowering(graph).done


VIEWS = {
    "view.default", "_unsafe_view.default", "reshape.default", "expand.default", "transpose.int", "t.default",
    "permute.default", "select.int", "slice.Tensor", "unsqueeze.default", "squeeze.dim", "squeeze.dims",
    "squeeze.default", "alias.default", "detach.default",
}  # fmt: skip
SAME = {"clone.default", "contiguous.default", "lift_fresh_copy.default"}
ARITHMETIC = {
    "neg.default": "(-{0})",
    "relu.default": "relu({0})",
    "exp.default": "exponential({0})",
    "sigmoid.default": "sigmoid({0})",
    "sqrt.default": "root({0})",
    "mul.Tensor": "({0} * {1})",
    "mul.Scalar": "({0} * {1})",
    "div.Tensor": "({0} / {1})",
    "div.Scalar": "({0} / {1})",
    "add.Tensor": "({0} + {1})",
    "add.Scalar": "({0} + {1})",
    "sub.Tensor": "({0} - {1})",
    "sub.Scalar": "({0} - {1})",
    "rsub.Tensor": "({1} - {0})",
    "rsub.Scalar": "({1} - {0})",
}
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
FOLDED: dict[str, Callable] = {"neg": operator.neg, "mul": operator.mul, "div": operator.truediv}
FILLED = {"ones_like": 1, "zeros_like": 0, "new_zeros": 0, "new_ones": 1, "zeros": 0, "ones": 1}
GIVEN = {"scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2}  # which argument is the number


def name_of(node: Node) -> str:
    """Of an operator of torch without its namespace; "" of all else."""
    return str(node.target).removeprefix("aten.") if isinstance(node.target, _torch.OPERATOR) else ""


class _Lowering:
    def __init__(self, graph: GraphModule):
        self.done = Lowered()
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
            self.done.steps.append(loops.elementwise(out, value))
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
            return self._arithmetic(node, name)
        if packet in COMPARED:
            return self._compared(node, COMPARED[packet])
        if name not in METHODS:
            raise Unknown(name or str(target))
        return METHODS[name](self, like, *arguments, **node.kwargs)

    def _view(self, node: Node) -> Value:
        source, *others = node.args
        if any(isinstance(other, Node) for other in others):
            raise Unknown("a view by values")
        # of what has no data "unsafe" and "reshape" would copy
        view = aten.view.default if name_of(node) in ("_unsafe_view.default", "reshape.default") else node.target
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

    def _arithmetic(self, node: Node, name: str) -> Value:
        like = node.meta["val"]
        if not like.dtype.is_floating_point:
            raise Unknown("arithmetic of whole numbers")
        shape, dtype = tuple(like.shape), like.dtype
        parts = node.args
        if name.startswith("mul.") and not isinstance(parts[1], Node) and parts[1] == 1:
            return self.of(parts[0], dtype, shape)
        values = [self.of(part, dtype, shape) for part in parts[:2]]
        others = dict(node.kwargs)
        alpha = others.pop("alpha", parts[2] if len(parts) > 2 else 1)
        if others:
            raise Unknown("rounding")
        if alpha != 1:
            scaled = 0 if name.startswith("rsub") else 1
            values[scaled] = _op("({0} * {1})", Const(shape, dtype, alpha), values[scaled])
        fold = FOLDED.get(name.partition(".")[0])
        numbers = [float(value.value) for value in values if isinstance(value, Const)]
        if fold and len(numbers) == len(values) and not (fold is operator.truediv and numbers[1] == 0):
            return Const(shape, dtype, fold(*numbers))
        if name == "add.Tensor" and isinstance(values[0], Pieces) and isinstance(values[1], Pieces):
            one, two = values
            if one.axis == two.axis and not set(one.at) & set(two.at):
                return Pieces(shape, dtype, one.axis, one.at | two.at)
        values = [self.stored(value) if isinstance(value, Pieces) else value for value in values]
        return _op(ARITHMETIC[name], *values)

    def _compared(self, node: Node, sign: str) -> Value:
        left, right = node.args
        dtype = self.of(left).dtype
        whole = not dtype.is_floating_point
        if isinstance(right, Node):
            if self.of(right).dtype != dtype:
                raise Unknown("a comparison of two types")
        elif whole and isinstance(right, float):
            raise Unknown("a comparison of two types")
        shape = tuple(node.meta["val"].shape)
        values = self.of(left, dtype, shape), self.of(right, dtype, shape)
        return Op(shape, torch.bool, f"({{0}} {sign} {{1}})", values)

    def _where(self, like, condition, one, other):
        shape = tuple(like.shape)
        parts = self.of(condition, torch.bool, shape), self.of(one, like.dtype, shape), self.of(other, like.dtype, shape)
        return Op(shape, like.dtype, "({0} ? {1} : {2})", parts)

    def _passed(self, like, slope, inputs, threshold):
        shape, dtype = tuple(like.shape), like.dtype
        parts = [self.of(part, dtype, shape) for part in (slope, inputs, threshold)]
        return _op("passed({0}, {1}, {2})", *parts)

    def _copied(self, like, inputs, **options):
        if set(options) - {"dtype", "device", "layout", "memory_format", "non_blocking", "pin_memory"}:
            raise Unknown("a copy")
        return self.of(inputs, like.dtype)

    def _power(self, like, inputs, exponent):
        if exponent not in (1, 2):
            raise Unknown("a power")
        value = self.of(inputs, like.dtype)
        return value if exponent == 1 else _op("square({0})", value)

    def _squared(self, like, inputs, targets, reduction=1):
        shape = tuple(self.of(inputs).shape)
        parts = self.of(inputs, like.dtype, shape), self.of(targets, like.dtype, shape)
        value = _op("square({0} - {1})", *parts)
        return value if reduction == 0 else self._total(value, like, reduction == 1)

    def _squared_backward(self, like, slope, inputs, targets, reduction):
        shape, dtype = tuple(like.shape), like.dtype
        parts = [self.of(part, dtype, shape) for part in (slope, inputs, targets)]
        factor = 2 / math.prod(shape) if reduction == 1 else 2
        return _op("({3} * ({1} - {2}) * {0})", *parts, Const(shape, dtype, factor))

    def _total(self, value: Value, like: Tensor, mean: bool) -> Value:
        return self._summed(value, [*range(len(value.shape))], like, mean)

    def _summed(self, value: Value, axes: Sequence[int], like: Tensor, mean: bool) -> Value:
        """The sum or mean over some axes."""
        if isinstance(value, Pieces):
            value = self.stored(value)
        gone = {axis % max(1, len(value.shape)) for axis in axes} or {*range(len(value.shape))}
        kept = [1 if axis in gone else size for axis, size in enumerate(value.shape)]
        if isinstance(value, Const):
            number = math.prod(value.shape) / math.prod(kept)
            return Const(tuple(like.shape), like.dtype, value.value if mean else value.value * number)
        out = self.room(like.dtype, kept)
        self.done.steps.append(loops.sums(spread(out, value.shape), value))
        found = seen(out, lambda tensor: tensor.view(like.shape))
        if not mean:
            return found
        number = math.prod(value.shape) // math.prod(kept)
        return _op("({0} / {1})", found, Const(found.shape, like.dtype, number))

    def _sum(self, like, inputs, axes=None, keepdim=False, dtype=None):
        value = self.of(inputs)
        if value.dtype != like.dtype:
            value = self.cast(value, like.dtype)
        return self._summed(value, axes or [], like, False)

    def _mean(self, like, inputs, axes=None, keepdim=False, dtype=None):
        return self._summed(self.of(inputs, like.dtype), axes or [], like, True)

    def _softmax(self, like, inputs, axis, other=None, **_):
        name = name_of(self.node)
        out = self.new()
        logarithm, safe = name.startswith("_log"), name.startswith("_safe")
        value = self.of(inputs, like.dtype)
        self.done.steps.append(loops.softmax(out, value, axis % len(out.shape), safe, logarithm))
        return out

    def _softmax_backward(self, like, slope, outputs, axis, dtype):
        out = self.new()
        logarithm = name_of(self.node).startswith("_log")
        values = self.of(slope, like.dtype, out.shape), self.of(outputs, like.dtype, out.shape)
        self.done.steps.append(loops.softmax_backward(out, *values, axis % len(out.shape), logarithm))
        return out

    def _layer_norm(self, likes, inputs, shape, scale, shift, eps):
        if len(shape) != 1:
            raise Unknown("layer norm over several axes")
        like = likes[0]
        outs = [self.room(each.dtype, tuple(each.shape)) for each in likes]
        full = [spread(out, outs[0].shape) for out in outs]
        by = [self.of(1.0 if scale is None else scale, like.dtype, like.shape)]
        by += [self.of(0.0 if shift is None else shift, like.dtype, like.shape)]
        self.done.steps.append(loops.layer_norm(full, self.of(inputs, like.dtype), *by, eps))
        return outs

    def _layer_norm_backward(self, likes, slope, inputs, shape, mean, rate, scale, shift, wanted):
        if len(shape) != 1 or any(wanted[1:]):
            raise Unknown("layer norm with slopes of its own")
        like = likes[0]
        out = self.room(like.dtype, tuple(like.shape))
        values = [self.of(part, like.dtype) for part in (slope, inputs, mean, rate)]
        by = self.of(1.0 if scale is None else scale, like.dtype, like.shape)
        self.done.steps.append(loops.layer_norm_backward(out, *values, by))
        return [out, None, None]

    def _gather(self, like, inputs, axis, index, **_):
        table = self.stored(self.of(inputs))
        return loops.gathered(table, axis % len(table.shape), self.of(index), like.dtype)

    def _scattered(self, like, inputs, axis, index, source):
        out = self.new()
        self.store(out, self.of(inputs, like.dtype))
        places = self.of(index)
        adds = name_of(self.node) == "scatter_add.default"
        value = self.of(source, like.dtype, None if adds else places.shape)
        if value.shape != places.shape:
            raise Unknown("a part of what is scattered")
        self.done.steps.append(loops.scattered(out, axis % len(out.shape), places, value, adds))
        return out

    def _joined(self, like, inputs, axis=0):
        """Tensors one after the other along an axis."""
        out, begin = self.new(), 0
        stacks = name_of(self.node).startswith("stack")
        axis %= len(out.shape)
        for each in inputs:
            size = 1 if stacks else self.of(each).shape[axis]
            part = seen(out, lambda view, at=begin, size=size: view.narrow(axis, at, size))
            value = self.of(each, like.dtype)
            if stacks:
                part = seen(part, lambda view: view.select(axis, 0))
            self.store(part, value)
            begin += size
        return out

    def _select_backward(self, like, slope, sizes, axis, index):
        shape = tuple(like.shape)
        return Pieces(shape, like.dtype, axis % len(shape), {index % shape[axis]: self.of(slope, like.dtype)})

    def _product(self, like, *parts, beta=1, alpha=1):
        name = name_of(self.node).partition(".")[0]
        if like.dtype not in (torch.float32, torch.float64):
            raise Unknown(f"{like.dtype}")
        shape = tuple(like.shape)
        operands = [self._operand(part, like.dtype, shape if len(parts) - i == 3 else None) for i, part in enumerate(parts)]
        out = self.new()
        factors = (float(beta), float(alpha)) if len(parts) == 3 else ()
        self.done.steps.append(Product(name, [out, *operands], factors))
        return out

    def _operand(self, part, dtype, shape) -> Leaf:
        value = self.of(part, dtype, shape)
        if shape is not None:  # what is added may have any strides
            return self.stored(value)
        found = self.stored(value)
        return found if _fits_product(found) else self.stored(found, dense(found.shape, range(len(found.shape))))

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


def _op(text: str, *parts: Value) -> Op:
    return Op(parts[0].shape, parts[0].dtype, text, parts)


def _layout(value: Value) -> tuple[int, ...]:
    """The strides with which a value is best stored: in the order of what it is computed from."""
    full = [each for each in leaves_of(value) if each.shape == value.shape and 0 not in each.strides]
    orders = [tuple(order_of(each.strides)) for each in full]
    plain = tuple(range(len(value.shape)))
    order = max(orders, key=lambda each: (orders.count(each), each == plain)) if orders else plain
    return dense(value.shape, order)


def _fits_product(operand: Leaf) -> bool:
    """Whether a product takes it without a copy: one of the last two axes lies close in memory."""
    (rows, columns), (down, across) = operand.shape[-2:], operand.strides[-2:]
    return (across == 1 and (down >= columns or rows == 1)) or (down == 1 and (across >= rows or columns == 1))


METHODS: dict[str, Callable] = {
    "where.self": _Lowering._where,
    "threshold_backward.default": _Lowering._passed,
    "_to_copy.default": _Lowering._copied,
    "pow.Tensor_Scalar": _Lowering._power,
    "mse_loss.default": _Lowering._squared,
    "mse_loss_backward.default": _Lowering._squared_backward,
    "sum.default": _Lowering._sum,
    "sum.dim_IntList": _Lowering._sum,
    "mean.default": _Lowering._mean,
    "mean.dim": _Lowering._mean,
    "_softmax.default": _Lowering._softmax,
    "_log_softmax.default": _Lowering._softmax,
    "_safe_softmax.default": _Lowering._softmax,
    "_softmax_backward_data.default": _Lowering._softmax_backward,
    "_log_softmax_backward_data.default": _Lowering._softmax_backward,
    "native_layer_norm.default": _Lowering._layer_norm,
    "native_layer_norm_backward.default": _Lowering._layer_norm_backward,
    "gather.default": _Lowering._gather,
    "scatter_add.default": _Lowering._scattered,
    "scatter.value": _Lowering._scattered,
    "stack.default": _Lowering._joined,
    "cat.default": _Lowering._joined,
    "select_backward.default": _Lowering._select_backward,
    "mm.default": _Lowering._product,
    "bmm.default": _Lowering._product,
    "addmm.default": _Lowering._product,
    "baddbmm.default": _Lowering._product,
}
