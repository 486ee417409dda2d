"""The C++ of loops: elementwise computations, sums, and what goes over rows twice, as softmax and layer norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fomaml.engines.compiled.values import (
    TYPES,
    Const,
    Leaf,
    Op,
    Unknown,
    Value,
    is_dense,
    leaves_of,
    number,
    order_of,
    spread,
)


@dataclass
class Loop:
    """One loop: the text of a function without its name, and the tensors that it is called with, those first that it
    writes. work: how often the innermost is run, where the outermost may be shared out among threads; else 0.
    """

    text: str
    leaves: list[Leaf]
    work: int = 0

    def shared(self, threads: int) -> str:
        """The text, for so many threads where that helps."""
        if threads == 1 or self.work < MUCH:
            return self.text
        head, first, rest = self.text.partition("for (")
        alone = head.endswith(INDEPENDENT + "\n")
        pragma = f'_Pragma("omp parallel for{" simd" if alone else ""} num_threads({threads})")\n'
        return head.removesuffix(INDEPENDENT + "\n") + pragma + first + rest


INDEPENDENT = '_Pragma("GCC ivdep")'
MUCH = 32_768


@dataclass
class Axes:
    """The axes of a loop, merged where no tensor tells them apart; the outermost first."""

    sizes: list[int]
    strides: list[list[int]] = field(default_factory=list)  # by tensor


def merged(shape: Sequence[int], leaves: Sequence[Leaf], order: Sequence[int]) -> Axes:
    """In this order, those of size 1 left out."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in leaves]
    for axis in order:
        size = shape[axis]
        if size == 1:
            continue
        steps = [leaf.strides[axis] for leaf in leaves]
        if sizes and all(own[-1] == step * size for own, step in zip(strides, steps)):
            sizes[-1] *= size
            for own, step in zip(strides, steps):
                own[-1] = step
        else:
            sizes.append(size)
            for own, step in zip(strides, steps):
                own.append(step)
    return Axes(sizes, strides)


class Body:
    """The tensors of a loop, each once, and what stands for their elements."""

    def __init__(self, written: Sequence[Leaf], values: Sequence[Value]):
        self.leaves: list[Leaf] = list(written)
        self.written = len(self.leaves)
        self.numbers: dict[tuple, int] = {}
        for value in values:
            for leaf in leaves_of(value):
                key = self._key(leaf)
                if key not in self.numbers:
                    self.numbers[key] = len(self.leaves)
                    self.leaves.append(leaf)

    @staticmethod
    def _key(leaf: Leaf) -> tuple:
        return id(leaf.buffer), leaf.shape, leaf.strides, leaf.offset

    def element(self, place: int, axes: Axes, start: int = 0) -> str:
        """The element of a tensor; start: the axes before this one are those of its own pointer."""
        steps = axes.strides[place]
        index = [
            f"i{i} * {step}" if step != 1 else f"i{i}" for i, step in enumerate(steps) if step and i >= start
        ]
        return f"p{place}[{' + '.join(index) or '0'}]"

    def computed(self, value: Value, axes: Axes) -> str:
        if isinstance(value, Const):
            return number(value.value, value.dtype)
        if isinstance(value, Leaf):
            return self.element(self.numbers[self._key(value)], axes)
        if isinstance(value, Op):
            return value.text.format(*(self.computed(part, axes) for part in value.parts))
        raise Unknown("pieces")

    def function(self, lines: Sequence[str], shared: Axes | None = None) -> Loop:
        """shared: the axes, where the outermost loop may be shared out."""
        kinds = [TYPES[leaf.dtype] for leaf in self.leaves]
        arguments = [
            f"{'' if i < self.written else 'const '}{kind}* __restrict p{i}" for i, kind in enumerate(kinds)
        ]
        work = math.prod(shared.sizes) if shared and shared.sizes else 0
        return Loop(f"({', '.join(arguments)}) {{\n" + "\n".join(lines) + "\n}\n", self.leaves, work)


def opened(axes: Axes, numbers: Sequence[int], independent: bool = False) -> list[str]:
    """The heads of nested loops over these axes. independent: no element of the innermost depends on another."""
    lines = [f"for (number i{i} = 0; i{i} < {axes.sizes[i]}; i{i}++) {{" for i in numbers]
    if independent and lines:
        lines.insert(len(lines) - 1, INDEPENDENT)
    return lines


def elementwise(out: Leaf, value: Value, adds: bool = False) -> Loop:
    """Each element of a tensor by a value of its shape. adds: to what is there."""
    body = Body([out], [value])
    axes = merged(out.shape, body.leaves, order_of(out.strides))
    every = range(len(axes.sizes))
    line = f"{body.element(0, axes)} {'+=' if adds else '='} {body.computed(value, axes)};"
    lines = [*opened(axes, every, not adds), line, "}" * len(axes.sizes)]
    return body.function(lines, None if adds or "within(" in line else axes)


def sums(out: Leaf, value: Value) -> Loop:
    """The sum of a value over the axes along which the tensor, broadcast to its shape, has the stride 0."""
    body = Body([out], [value])
    full = [leaf for leaf in body.leaves[1:] if 0 not in leaf.strides] or body.leaves[1:] or [out]
    largest = max(full, key=lambda leaf: sum(size > 1 for size in leaf.shape))
    order = order_of(largest.strides)
    axes = merged(out.shape, body.leaves, order)
    kept = [i for i, step in enumerate(axes.strides[0]) if step]
    gone = [i for i, step in enumerate(axes.strides[0]) if not step]
    found, kind = body.element(0, axes), TYPES[out.dtype]
    computed = f"({kind})({body.computed(value, axes)})"
    if kept and gone and kept[-1] > gone[-1] and axes.sizes[kept[-1]] >= 4:  # in vectors along what is kept
        *outer, inner = kept
        lines = [
            *opened(axes, outer),
            *opened(axes, [inner]),
            f"{found} = 0; }}",
            *opened(axes, gone),
            *opened(axes, [inner], True),
            f"{found} += {computed}; }}",
            "}" * (len(outer) + len(gone)),
        ]
        return body.function(lines, axes if outer else None)
    heads = opened(axes, gone)
    if heads:
        heads.insert(len(heads) - 1, '_Pragma("omp simd reduction(+:total)")')
    lines = [
        *opened(axes, kept),
        f"{kind} total = 0;",
        *heads,
        f"total += {computed};",
        "}" * len(gone),
        f"{found} = total;",
        "}" * len(kept),
    ]
    return body.function(lines, axes if kept else None)


def rows(outs: Sequence[Leaf], values: Sequence[Value], axis: int, parts: Sequence[str]) -> Loop:
    """What goes over each row along an axis several times.

    outs: those of one number a row have the stride 0 along it. parts: lines of C++; "{for}" begins a loop over a row,
    {0}, {1}, … are the elements of `values`, {out0}, … those of `outs`, {type} the type.
    """
    body = Body(outs, values)
    shape = outs[0].shape
    order = [i for i in order_of(outs[0].strides) if i != axis % len(shape)]
    axes = merged(shape, body.leaves, order)
    last = len(axes.sizes)
    axes.sizes.append(shape[axis])
    for own, leaf in zip(axes.strides, body.leaves):
        own.append(leaf.strides[axis])
    names = {f"out{i}": body.element(i, axes) for i in range(len(outs))}
    names |= {"type": TYPES[outs[0].dtype], "size": str(shape[axis])}
    names["for"] = f"for (number i{last} = 0; i{last} < {shape[axis]}; i{last}++)"
    elements = [body.computed(value, axes) for value in values]
    lines = [part.format(*elements, **names) for part in parts]
    return body.function([*opened(axes, range(last)), *lines, "}" * last], axes if last else None)


SUM = '_Pragma("omp simd reduction(+:{0})")'
MOST = '_Pragma("omp simd reduction(max:most)")'


def softmax(out: Leaf, inputs: Value, axis: int, safe: bool, logarithm: bool) -> Loop:
    """safe: rows that are -inf alone give 0."""
    begin = [
        "{type} most = -__builtin_inf();",
        MOST + " {for} {{ {type} x = {0}; {out0} = x; most = x > most ? x : most; }}",
        "{type} total = 0;",
    ]
    total = SUM.format("total")
    if logarithm:
        parts = [
            *begin,
            total + " {for} total += exponential({out0} - most);",
            "const {type} less = logarithm(total);",
            "{for} {out0} = {out0} - most - less;",  # one after the other: their sum would lose digits of less
        ]
    else:
        parts = [
            *begin,
            "most = most == ({type})-__builtin_inf() ? 0 : most;" if safe else "",
            total + " {for} {{ {type} x = exponential({out0} - most); {out0} = x; total += x; }}",
            "{type} scale = total == 0 ? 0 : 1 / total;" if safe else "{type} scale = 1 / total;",
            "{for} {out0} *= scale;",
        ]
    return rows([out], [inputs], axis, parts)


SHORT = 32  # numbers in a row


def has_short_rows(out: Leaf, axis: int) -> bool:
    """Whether rows along an axis are short and lie one after the other."""
    return 1 < out.shape[axis] <= SHORT and out.strides[axis] == 1 and is_dense(out.shape, out.strides)


def log_softmax(out: Leaf, axis: int) -> Loop:
    """Of the short rows of a tensor, in place: a sixth of the time that one row after the other takes."""
    kind, size = TYPES[out.dtype], out.shape[axis]
    count = math.prod(out.shape) // size
    lines = [
        f"for (number i = 0; i < {count}; i += BLOCK) {{",
        f"const number rows = {count} - i < BLOCK ? {count} - i : BLOCK;",
        f"log_softmax<{kind}, {size}>(p0 + i * {size}, rows);",
        "}",
    ]
    return Loop(f"({kind}* __restrict p0) {{\n" + "\n".join(lines) + "\n}\n", [out], count * size)


def softmax_backward(out: Leaf, slope: Value, outputs: Value, axis: int, logarithm: bool) -> Loop:
    total = "{type} total = 0; " + SUM.format("total")
    if logarithm:
        parts = [total + " {for} total += {0};", "{for} {out0} = {0} - exponential({1}) * total;"]
    else:
        parts = [total + " {for} total += {0} * {1};", "{for} {out0} = ({0} - total) * {1};"]
    return rows([out], [slope, outputs], axis, parts)


def layer_norm(outs: Sequence[Leaf], inputs: Value, scale: Value, shift: Value, eps: float) -> Loop:
    """outs: outputs, and of each row its mean and 1 / deviation, of the same shape."""
    parts = [
        "{type} total = 0; " + SUM.format("total") + " {for} {{ {type} x = {0}; {out0} = x; total += x; }}",
        "const {type} mean = total / {size};",
        "{type} squares = 0; " + SUM.format("squares") + " {for} squares += square({out0} - mean);",
        f"const {{type}} rate = 1 / root(squares / {{size}} + {number(eps, outs[0].dtype)});",
        "{for} {out0} = ({out0} - mean) * rate * {1} + {2};",
        "{out1} = mean; {out2} = rate;",
    ]
    return rows(outs, [inputs, scale, shift], -1, parts)


def layer_norm_backward(
    out: Leaf, slope: Value, inputs: Value, mean: Value, rate: Value, scale: Value
) -> Loop:
    parts = [
        "{type} one = 0, two = 0; " + SUM.format("one, two"),
        "{for} {{ const {type} h = {0} * {4}; one += h; two += h * (({1} - {2}) * {3}); }}",
        "one /= {size}; two /= {size};",
        "{for} {out0} = {3} * ({0} * {4} - one - ({1} - {2}) * {3} * two);",
    ]
    shape = out.shape
    return rows([out], [slope, inputs, spread(mean, shape), spread(rate, shape), scale], -1, parts)


def gathered(table: Leaf, axis: int, index: Value, dtype: torch.dtype) -> Op:
    """What stands along an axis at these places, one a row."""
    size = table.shape[axis]
    first = table.like.select(axis, 0).unsqueeze(axis)
    if tuple(first.expand(index.shape).shape) != index.shape:
        raise Unknown("gather")
    at = Leaf(index.shape, table.dtype, table.buffer, first.expand(index.shape))
    text = f"(&{{0}})[within({{1}}, {size}) * {table.strides[axis]}]"
    return Op(index.shape, dtype, text, (at, index))


def scattered(out: Leaf, axis: int, index: Value, source: Value, adds: bool) -> Loop:
    """Set what stands along an axis at these places, or add to it."""
    size, step = out.shape[axis], out.strides[axis]
    first = out.like.select(axis, 0).unsqueeze(axis).expand(index.shape)
    at = Leaf(index.shape, out.dtype, out.buffer, first)
    body = Body([at], [index, source])
    axes = merged(index.shape, body.leaves, range(len(index.shape)))
    place = f"within({body.computed(index, axes)}, {size}) * {step}"
    line = f"(&{body.element(0, axes)})[{place}] {'+=' if adds else '='} {body.computed(source, axes)};"
    every = range(len(axes.sizes))
    return body.function([*opened(axes, every), line, "}" * len(axes.sizes)])
