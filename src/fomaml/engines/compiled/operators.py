"""The operators of torch of which loops are written, each a function that adds its steps and gives its value."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from fomaml.engines.compiled import loops
from fomaml.engines.compiled.values import Const, Leaf, Op, Pieces, Unknown, Value, dense, seen, spread
from fomaml.engines.watching import OPERATOR


@dataclass
class Product:
    """A product of matrices by torch. name: of the operator. out: first of the operands."""

    name: str
    operands: list[Leaf]
    factors: tuple[float, ...] = ()


class Making(Protocol):
    """What the functions below are given. node: the present one. steps: to add to."""

    node: Node
    steps: list[Any]

    def of(self, part: Any, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> Value:
        """An argument of a node as a value, of this dtype and broadcast to this shape."""

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """In another dtype."""

    def stored(self, value: Value, strides: Sequence[int] | None = None) -> Leaf:
        """A value in memory; strides: in this order alone."""

    def store(self, out: Leaf, value: Value) -> None:
        """Write a value there."""

    def room(self, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int] | None = None) -> Leaf:
        """A new tensor in memory."""

    def new(self) -> Leaf:
        """A new tensor for what the node gives, with the strides that it has in the trace."""


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
    return str(node.target).removeprefix("aten.") if isinstance(node.target, OPERATOR) else ""


def arithmetic(making: Making, node: Node, name: str) -> Value:
    like = node.meta["val"]
    if not like.dtype.is_floating_point:
        raise Unknown("arithmetic of whole numbers")
    shape, dtype = tuple(like.shape), like.dtype
    parts = node.args
    if name.startswith("mul.") and not isinstance(parts[1], Node) and parts[1] == 1:
        return making.of(parts[0], dtype, shape)
    values = [making.of(part, dtype, shape) for part in parts[:2]]
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
    one, two = values[0], values[-1]
    if name == "add.Tensor" and isinstance(one, Pieces) and isinstance(two, Pieces):  # noqa: SIM102 - types
        if one.axis == two.axis and not set(one.at) & set(two.at):
            return Pieces(shape, dtype, one.axis, one.at | two.at)
    values = [making.stored(value) if isinstance(value, Pieces) else value for value in values]
    return _op(ARITHMETIC[name], *values)


def compared(making: Making, node: Node, sign: str) -> Value:
    left, right = node.args
    dtype = making.of(left).dtype
    whole = not dtype.is_floating_point
    if isinstance(right, Node):
        if making.of(right).dtype != dtype:
            raise Unknown("a comparison of two types")
    elif whole and isinstance(right, float):
        raise Unknown("a comparison of two types")
    shape = tuple(node.meta["val"].shape)
    values = making.of(left, dtype, shape), making.of(right, dtype, shape)
    return Op(shape, torch.bool, f"({{0}} {sign} {{1}})", values)


def _where(making: Making, like, condition, one, other):
    shape = tuple(like.shape)
    parts = (
        making.of(condition, torch.bool, shape),
        making.of(one, like.dtype, shape),
        making.of(other, like.dtype, shape),
    )
    return Op(shape, like.dtype, "({0} ? {1} : {2})", parts)


def _passed(making: Making, like, slope, inputs, threshold):
    shape, dtype = tuple(like.shape), like.dtype
    parts = [making.of(part, dtype, shape) for part in (slope, inputs, threshold)]
    return _op("passed({0}, {1}, {2})", *parts)


def _copied(making: Making, like, inputs, **options):
    if set(options) - {"dtype", "device", "layout", "memory_format", "non_blocking", "pin_memory"}:
        raise Unknown("a copy")
    return making.of(inputs, like.dtype)


def _power(making: Making, like, inputs, exponent):
    if exponent not in (1, 2):
        raise Unknown("a power")
    value = making.of(inputs, like.dtype)
    return value if exponent == 1 else _op("square({0})", value)


def _squared(making: Making, like, inputs, targets, reduction=1):
    shape = tuple(making.of(inputs).shape)
    parts = making.of(inputs, like.dtype, shape), making.of(targets, like.dtype, shape)
    value = _op("square({0} - {1})", *parts)
    return value if reduction == 0 else _total(making, value, like, reduction == 1)


def _squared_backward(making: Making, like, slope, inputs, targets, reduction):
    shape, dtype = tuple(like.shape), like.dtype
    parts = [making.of(part, dtype, shape) for part in (slope, inputs, targets)]
    factor = 2 / math.prod(shape) if reduction == 1 else 2
    return _op("({3} * ({1} - {2}) * {0})", *parts, Const(shape, dtype, factor))


def _total(making: Making, value: Value, like: Tensor, mean: bool) -> Value:
    return _summed(making, value, [*range(len(value.shape))], like, mean)


def _summed(making: Making, value: Value, axes: Sequence[int], like: Tensor, mean: bool) -> Value:
    """The sum or mean over some axes."""
    if isinstance(value, Pieces):
        value = making.stored(value)
    gone = {axis % max(1, len(value.shape)) for axis in axes} or {*range(len(value.shape))}
    kept = [1 if axis in gone else size for axis, size in enumerate(value.shape)]
    if isinstance(value, Const):
        number = math.prod(value.shape) / math.prod(kept)
        return Const(tuple(like.shape), like.dtype, value.value if mean else value.value * number)
    out = making.room(like.dtype, kept)
    making.steps.append(loops.sums(spread(out, value.shape), value))
    found = seen(out, lambda tensor: tensor.view(like.shape))
    if not mean:
        return found
    number = math.prod(value.shape) // math.prod(kept)
    return _op("({0} / {1})", found, Const(found.shape, like.dtype, number))


def _sum(making: Making, like, inputs, axes=None, keepdim=False, dtype=None):
    value = making.of(inputs)
    if value.dtype != like.dtype:
        value = making.cast(value, like.dtype)
    return _summed(making, value, axes or [], like, False)


def _mean(making: Making, like, inputs, axes=None, keepdim=False, dtype=None):
    return _summed(making, making.of(inputs, like.dtype), axes or [], like, True)


def _softmax(making: Making, like, inputs, axis, other=None, **_):
    name = name_of(making.node)
    out = making.new()
    logarithm, safe = name.startswith("_log"), name.startswith("_safe")
    value, axis = making.of(inputs, like.dtype), axis % len(out.shape)
    if logarithm and loops.has_short_rows(out, axis):
        making.store(out, value)
        making.steps.append(loops.log_softmax(out, axis))
    else:
        making.steps.append(loops.softmax(out, value, axis, safe, logarithm))
    return out


def _softmax_backward(making: Making, like, slope, outputs, axis, dtype):
    out = making.new()
    logarithm = name_of(making.node).startswith("_log")
    values = making.of(slope, like.dtype, out.shape), making.of(outputs, like.dtype, out.shape)
    making.steps.append(loops.softmax_backward(out, *values, axis % len(out.shape), logarithm))
    return out


def _layer_norm(making: Making, likes, inputs, shape, scale, shift, eps):
    if len(shape) != 1:
        raise Unknown("layer norm over several axes")
    like = likes[0]
    outs = [making.room(each.dtype, tuple(each.shape)) for each in likes]
    full = [spread(out, outs[0].shape) for out in outs]
    by = making.of(1.0 if scale is None else scale, like.dtype, like.shape)
    plus = making.of(0.0 if shift is None else shift, like.dtype, like.shape)
    making.steps.append(loops.layer_norm(full, making.of(inputs, like.dtype), by, plus, eps))
    return outs


def _layer_norm_backward(making: Making, likes, slope, inputs, shape, mean, rate, scale, shift, wanted):
    if len(shape) != 1 or any(wanted[1:]):
        raise Unknown("layer norm with slopes of its own")
    like = likes[0]
    out = making.room(like.dtype, tuple(like.shape))
    slope, inputs, mean, rate = [making.of(part, like.dtype) for part in (slope, inputs, mean, rate)]
    by = making.of(1.0 if scale is None else scale, like.dtype, like.shape)
    making.steps.append(loops.layer_norm_backward(out, slope, inputs, mean, rate, by))
    return [out, None, None]


def _gather(making: Making, like, inputs, axis, index, **_):
    table = making.stored(making.of(inputs))
    return loops.gathered(table, axis % len(table.shape), making.of(index), like.dtype)


def _scattered(making: Making, like, inputs, axis, index, source):
    out = making.new()
    making.store(out, making.of(inputs, like.dtype))
    places = making.of(index)
    adds = name_of(making.node) == "scatter_add.default"
    value = making.of(source, like.dtype, None if adds else places.shape)
    if value.shape != places.shape:
        raise Unknown("a part of what is scattered")
    making.steps.append(loops.scattered(out, axis % len(out.shape), places, value, adds))
    return out


def _joined(making: Making, like, inputs, axis=0):
    """Tensors one after the other along an axis."""
    out, begin = making.new(), 0
    stacks = name_of(making.node).startswith("stack")
    axis %= len(out.shape)
    for each in inputs:
        size = 1 if stacks else making.of(each).shape[axis]
        part = seen(out, lambda view, at=begin, size=size: view.narrow(axis, at, size))
        value = making.of(each, like.dtype)
        if stacks:
            part = seen(part, lambda view: view.select(axis, 0))
        making.store(part, value)
        begin += size
    return out


def _select_backward(making: Making, like, slope, sizes, axis, index):
    shape = tuple(like.shape)
    return Pieces(shape, like.dtype, axis % len(shape), {index % shape[axis]: making.of(slope, like.dtype)})


def _slice_backward(making: Making, like, slope, sizes, axis, start, end, step):
    if tuple(slope.meta["val"].shape) != tuple(like.shape):
        raise Unknown("a part of an axis")
    return making.of(slope, like.dtype)  # of all of it, as torch 2.7 traces x[:, 0]


def _product(making: Making, like, *parts, beta=1, alpha=1):
    name = name_of(making.node).partition(".")[0]
    if like.dtype not in (torch.float32, torch.float64):
        raise Unknown(f"{like.dtype}")
    shape = tuple(like.shape)
    operands = [
        _operand(making, part, like.dtype, shape if len(parts) - i == 3 else None)
        for i, part in enumerate(parts)
    ]
    out = making.new()
    factors = (float(beta), float(alpha)) if len(parts) == 3 else ()
    making.steps.append(Product(name, [out, *operands], factors))
    return out


def _operand(making: Making, part, dtype, shape) -> Leaf:
    value = making.of(part, dtype, shape)
    if shape is not None:  # what is added may have any strides
        return making.stored(value)
    found = making.stored(value)
    return (
        found if _fits_product(found) else making.stored(found, dense(found.shape, range(len(found.shape))))
    )


def _op(text: str, *parts: Value) -> Op:
    return Op(parts[0].shape, parts[0].dtype, text, parts)


def _fits_product(operand: Leaf) -> bool:
    """Whether a product takes it without a copy: one of the last two axes lies close in memory."""
    (rows, columns), (down, across) = operand.shape[-2:], operand.strides[-2:]
    return (across == 1 and (down >= columns or rows == 1)) or (
        down == 1 and (across >= rows or columns == 1)
    )


METHODS: dict[str, Callable] = {
    "where.self": _where,
    "threshold_backward.default": _passed,
    "_to_copy.default": _copied,
    "pow.Tensor_Scalar": _power,
    "mse_loss.default": _squared,
    "mse_loss_backward.default": _squared_backward,
    "sum.default": _sum,
    "sum.dim_IntList": _sum,
    "mean.default": _mean,
    "mean.dim": _mean,
    "_softmax.default": _softmax,
    "_log_softmax.default": _softmax,
    "_safe_softmax.default": _softmax,
    "_softmax_backward_data.default": _softmax_backward,
    "_log_softmax_backward_data.default": _softmax_backward,
    "native_layer_norm.default": _layer_norm,
    "native_layer_norm_backward.default": _layer_norm_backward,
    "gather.default": _gather,
    "scatter_add.default": _scattered,
    "scatter.value": _scattered,
    "stack.default": _joined,
    "cat.default": _joined,
    "select_backward.default": _select_backward,
    "slice_backward.default": _slice_backward,
    "mm.default": _product,
    "bmm.default": _product,
    "addmm.default": _product,
    "baddbmm.default": _product,
}
