"""Products of small matrices, whose sizes are built into their C++: see small.h."""

from __future__ import annotations

import math
from typing import NamedTuple

from fomaml.engines.compiled.loops import MUCH, Loop
from fomaml.engines.compiled.operators import Product
from fomaml.engines.compiled.values import TYPES, Leaf
from fomaml.engines.cpu import build

# products of two numbers in a product of matrices: below FEW what torch does around it takes longer on any processor,
# below MORE what products.cpp does, which is not made for less than NARROW columns or terms of a sum; from SHARED for
# each thread on several are faster than one
FEW, MORE, NARROW, SHARED = 50_000, 500_000, 32, 1_000_000
# numbers of the right matrix as it is copied, its columns filled up to vectors: 64 kB of float32
PACKED = 16384
LANES = 16  # of float32 in the widest vectors


class Matrix(NamedTuple):
    """One of a stack of matrices, or the only one. stack, down, across: from one to the next, of rows, of columns."""

    rows: int
    columns: int
    stack: int
    down: int
    across: int

    @property
    def turned(self) -> Matrix:
        return Matrix(self.columns, self.rows, self.stack, self.across, self.down)


def matrix_of(leaf: Leaf) -> Matrix:
    """The last two axes of a tensor, of which a stack has three."""
    rows, columns = leaf.shape[-2:]
    return Matrix(rows, columns, *(0, 0, 0, *leaf.strides)[-3:])


def stack_of(step: Product) -> int:
    """How many matrices there are in a stack."""
    shape = step.operands[0].shape
    return shape[0] if len(shape) == 3 else 1


def work(step: Product, of_one: bool = False) -> int:
    """How many products of two numbers there are in a product of matrices, or in one of a stack."""
    shape = step.operands[0].shape
    return math.prod(shape[-2:] if of_one else shape) * step.operands[-1].shape[-2]


def small(step: Product, threads: int) -> Loop | None:
    """A product as a loop over its stack, where that is faster than what a library does."""
    leaves = step.operands
    out, *added, left, right = map(matrix_of, leaves)
    stack = stack_of(step)
    narrow = min(left.columns, right.columns) < NARROW
    most = FEW if not build.leaves_registers_empty() else math.inf if narrow else MORE
    if work(step, of_one=True) >= most:
        return None
    total, shared = work(step), threads > 1 and stack > 1
    if threads > 1 and not shared and total >= SHARED * threads:
        return None  # for them all
    names = "p1", "p2"
    by_rows = left.across == 1 and right.down == 1 and right.columns == 1
    if out.across != 1 or (right.columns == 1 and out.down == 1 and not by_rows):
        # c turned is b turned times a turned
        out, left, right, added = out.turned, right.turned, left.turned, [each.turned for each in added]
        names = "p2", "p1"
    if (out.across != 1 and out.columns > 1) or right.rows * -(-right.columns // LANES) * LANES > PACKED:
        return None
    beta, alpha = step.factors or (0.0, 1.0)
    third = added[0] if added and beta else Matrix(0, 0, 0, 0, 0)
    sizes = (out.rows, left.columns, out.columns, out.down, left.down, left.across)
    sizes += (right.down, right.across, third.down, third.across)
    kind = TYPES[leaves[0].dtype]
    pointers = [f"p0 + i * {out.stack}", f"{names[0]} + i * {left.stack}", f"{names[1]} + i * {right.stack}"]
    pointers.append(f"p3 + i * {third.stack}" if added and beta else "nullptr")
    arguments = [f"{kind}* p0", *(f"const {kind}* p{place + 1}" for place in range(len(leaves) - 1))]
    call = (
        f"Small<{', '.join([kind, *map(str, sizes)])}>::product({', '.join(pointers)}, {beta!r}, {alpha!r});"
    )
    text = f"({', '.join(arguments)}) {{\nfor (number i = 0; i < {stack}; i++) {{\n{call}\n}}\n}}\n"
    order = [leaves[0], *leaves[-2:], *leaves[1:-2]]
    return Loop(text, order, total * MUCH // (SHARED * threads) if shared else 0)
