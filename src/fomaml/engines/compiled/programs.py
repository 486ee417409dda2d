"""A lowered function as a library of its own: its loops compiled without a header, its memory laid out once.

What takes `torch.compile`'s backend seconds, importing itself, looking at the graph and reading torch's headers, is
left out. Loops of the same text, as those of the inner steps, are compiled once.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Container, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from fomaml.engines import _torch
from fomaml.engines.compiled.lowering import Lowered, Step, lowered
from fomaml.engines.compiled.operators import Product
from fomaml.engines.compiled.small import FEW, SHARED, matrix_of, small, stack_of, work
from fomaml.engines.compiled.values import TYPES, Buffer, Leaf
from fomaml.engines.cpu import build
from fomaml.engines.cpu.build import kept, machine, name_of

HEADERS = [build.FOLDER / "lanes.h", *(Path(__file__).parent / name for name in ("loops.h", "small.h"))]
FLAGS = (*build.FAST, build.NATIVE, "-std=c++17", "-shared", "-fPIC", "-fno-exceptions")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
ALIGNMENT = 64


def program(graph: GraphModule, threads: int = 1) -> Callable[..., list[Tensor]]:
    """A traced function of tensors on a CPU. threads: those of long loops; of products torch's own number.

    Raises:
        Unknown: something in it of which no loop is written.
        Missing, RuntimeError: torch or the compiler lack what that needs.
    """
    found = lowered(graph)
    found.steps[:] = [(isinstance(step, Product) and small(step, threads)) or step for step in found.steps]
    ours = [step for step in found.steps if isinstance(step, Product) and _is_ours(step)]
    own, kinds = {id(step) for step in ours}, {str(step.operands[0].dtype) for step in ours}
    layout = _Layout(found.steps, own)
    text = _text(found, layout, threads, own)
    flags = [*FLAGS, *(["-fopenmp"] if threads > 1 else [])]  # the library of it that torch has loaded
    command = build.compiler()
    name = name_of("loops", [text, torch.__version__, *flags, *machine()])
    make = partial(build.compiled, command, flags, text)
    if not build.keeps():
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / name)
            library = ctypes.CDLL(str(Path(folder) / name))
    else:
        library = ctypes.CDLL(str(kept(name, make)))
    addresses = _torch.product_functions(PRODUCTS)
    addresses += [_address(dtype) if f"torch.{dtype}" in kinds else 0 for dtype in build.DTYPES]
    library.use((ctypes.c_void_p * len(addresses))(*addresses))
    return Program(library, found, layout)


def _is_ours(step: Product) -> bool:
    """Whether a product is one for products.cpp."""
    out = step.operands[0]
    return build.leaves_registers_empty() and out.strides[-1] == 1 and work(step, of_one=True) >= FEW


class Program:
    """Call it with the arguments of the function. Several threads may."""

    def __init__(self, library: ctypes.CDLL, found: Lowered, layout: _Layout):
        self._library = library
        self._run = library.run
        self._run.argtypes = [ctypes.c_void_p] * 3
        self._size, self._handles = layout.size, len(layout.operands)
        self._strides = [strides for _, _, strides in found.arguments]
        self._results = [(each.shape, each.strides, each.dtype) for each in found.results]
        self._pointers = ctypes.c_void_p * (len(self._strides) + len(self._results))
        self._free: list[_Arena] = []

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        given = [
            tensor
            if tensor.stride() == strides
            else torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
            for tensor, strides in zip(arguments, self._strides)
        ]
        results = [
            torch.empty_strided(shape, strides, dtype=dtype) for shape, strides, dtype in self._results
        ]
        pointers = self._pointers(*[tensor.data_ptr() for tensor in (*given, *results)])
        try:
            arena = self._free.pop()
        except IndexError:
            arena = _Arena(self._library, self._size, self._handles)
        failed = self._run(arena.start, pointers, arena.handles)
        self._free.append(arena)
        if failed == 1:
            raise IndexError("index out of bounds: a label beyond the outputs")
        if failed:
            raise RuntimeError("a product of matrices failed")
        return results


class _Arena:
    """Memory for what is needed between the steps of one call, and torch's handles of the tensors in it."""

    def __init__(self, library: ctypes.CDLL, size: int, handles: int):
        self._release = library.release
        self._release.argtypes = [ctypes.c_void_p]
        self._memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        start = self._memory.data_ptr()
        self.start = start + -start % ALIGNMENT
        self.handles = (ctypes.c_void_p * max(1, handles))()
        library.prepare.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        if library.prepare(self.start, self.handles):
            raise RuntimeError("torch makes no tensors of memory")

    def __del__(self):
        self._release(self.handles)


class _Layout:
    """Where each inner tensor lies: at the place of others, where these are not needed at the same time.

    size: of all, bytes. operands: of torch's products, each once. own: the ids of other products.
    """

    def __init__(self, steps: Sequence[Step], own: Container[int] = ()):
        self.operands: list[Leaf] = []
        self._known: dict[tuple, int] = {}
        times: dict[Buffer, tuple[int, int]] = {}
        for time, step in enumerate(steps):
            for leaf in step.operands if isinstance(step, Product) else step.leaves:
                first, _ = times.get(leaf.buffer, (time, time))
                times[leaf.buffer] = first, time
            if isinstance(step, Product) and id(step) not in own:
                for leaf in step.operands:
                    self._operand(leaf)
        self.places: dict[Buffer, int] = {}
        self.size = 0
        alive: list[tuple[int, int, int]] = []  # place, end, last time
        for buffer, (first, last) in sorted(times.items(), key=lambda item: item[1][0]):
            if buffer.place != "inner":
                continue
            alive = [each for each in alive if each[2] >= first]
            size = -(-buffer.bytes // ALIGNMENT) * ALIGNMENT
            place = 0
            for start, end, _ in sorted(alive):
                if start - place >= size:
                    break
                place = max(place, end)
            alive.append((place, place + size, last))
            self.places[buffer] = place
            self.size = max(self.size, place + size)

    def _key(self, leaf: Leaf) -> tuple:
        return id(leaf.buffer), leaf.shape, leaf.strides, leaf.offset

    def _operand(self, leaf: Leaf) -> None:
        if self._key(leaf) not in self._known:
            self._known[self._key(leaf)] = len(self.operands)
            self.operands.append(leaf)

    def number(self, leaf: Leaf) -> int:
        return self._known[self._key(leaf)]


def _text(found: Lowered, layout: _Layout, threads: int, own: Container[int]) -> str:
    """The C++ of a function."""
    functions: dict[str, str] = {}
    calls = []
    sizes_of: dict[str, str] = {}
    shift = len(found.arguments)

    def place_of(buffer: Buffer) -> int:
        return {"inner": -1, "given": buffer.number, "found": shift + buffer.number}[buffer.place]

    def pointer(leaf: Leaf) -> str:
        kind, offset = TYPES[leaf.dtype], leaf.offset
        if leaf.buffer.place == "inner":
            return f"({kind}*)(m + {layout.places[leaf.buffer] + offset * leaf.dtype.itemsize})"
        return f"({kind}*)t[{place_of(leaf.buffer)}] + {offset}"

    for step in found.steps:
        if id(step) in own:
            assert isinstance(step, Product)
            sizes = sizes_of.setdefault(_sizes(step), f"sizes{len(sizes_of)}")
            out, *added, left, right = step.operands
            kind, hands = TYPES[out.dtype], threads if work(step) >= SHARED * threads else 1
            pointers = [*map(pointer, (out, left, right, *added)), *([] if added else ["nullptr"])]
            beta, alpha = step.factors or (0.0, 1.0)
            calls.append(f"product<{kind}>({hands}, {', '.join(pointers)}, {sizes}, {beta!r}, {alpha!r});")
            continue
        if isinstance(step, Product):
            handles = [f"h[{layout.number(each)}]" for each in step.operands]
            calls.append(f"failed |= {step.name}({', '.join([*handles, *map(repr, step.factors)])});")
            continue
        name = functions.setdefault(step.shared(threads), f"loop{len(functions)}")
        calls.append(f"{name}({', '.join(map(pointer, step.leaves))});")
    operands = []
    for each in layout.operands:
        start = layout.places.get(each.buffer, 0) + each.offset * each.dtype.itemsize
        numbers = [place_of(each.buffer), _torch.code_of(each.dtype), len(each.shape), start]
        sizes, strides = (", ".join(map(str, each_)) for each_ in (each.shape, each.strides))
        operands.append(f"{{{', '.join(map(str, numbers))}, {{{sizes}}}, {{{strides}}}}},")
    count = len(operands)
    dynamic = [i for i, each in enumerate(layout.operands) if each.buffer.place != "inner"]
    inner = [i for i, each in enumerate(layout.operands) if each.buffer.place == "inner"]
    return "\n".join(
        [
            *(header.read_text(encoding="utf-8") for header in HEADERS),
            *(f"static __attribute__((noinline)) void {name}{text}" for text, name in functions.items()),
            *(f"static const number {name}[] = {{{text}}};" for text, name in sizes_of.items()),
            f"static const Operand operands[{count + 1}] = {{",
            *operands,
            "};",
            'extern "C" int prepare(char* m, void** h) {',
            f"return tensors(operands, {count}, true, m, nullptr, h);",
            "}",
            'extern "C" void release(void** h) {',
            *(f"drop(h[{i}]);" for i in inner),
            "}",
            'extern "C" int run(char* m, void** t, void** h) {',
            "wrong = 0;",
            f"int failed = tensors(operands, {count}, false, m, t, h);",
            *calls,
            *(f"drop(h[{i}]);" for i in dynamic),
            "return failed ? 2 : wrong;",
            "}",
        ]
    )


def _sizes(step: Product) -> str:
    """What products.cpp wants to know of a product."""
    out, *added, left, right = map(matrix_of, step.operands)
    strides = [
        number for each in (out, left, right, *added) for number in (each.stack, each.down, each.across)
    ]
    strides += [0] * (12 - len(strides))
    return ", ".join(map(str, (stack_of(step), left.rows, left.columns, right.columns, *strides)))


def _address(dtype: str) -> int:
    """Of the products of a dtype."""
    function = getattr(build.products(dtype), f"product_{dtype}")
    return ctypes.cast(function, ctypes.c_void_p).value or 0
