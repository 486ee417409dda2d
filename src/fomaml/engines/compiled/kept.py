"""What torch's compiler has made of a graph, kept as a library for the processes to come.

The name of the file is a digest of all that it depends on: the whole graph, the shapes, the versions and the processor.
Its content ends with a digest of itself. It is machine code, built here; no pickle is written or read.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.random import fork_rng

from fomaml.engines import _torch
from fomaml.engines.cpu import fusion
from fomaml.engines.cpu.build import NoFolder, keeps, kept, machine, name_of, sealed
from fomaml.engines.watching import OPERATOR, is_random


def induced(graph: GraphModule, inputs: Sequence[Tensor], options: dict) -> Callable:
    """The function of a graph by `torch.compile`'s backend; from the cache folder where an earlier process has left it.

    options: of the backend; only calls between kernels in C++ can be kept.
    """
    made: list[tuple[Callable, Path | None]] = []

    def build(path: Path) -> None:
        if not made:
            made.append(_torch.induce(graph, inputs, options))
        library = made[0][1]
        if library is None:
            raise NotKept
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".build-", delete=False) as file:
            try:
                file.write(sealed(library.read_bytes()))
                file.close()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink()
                raise

    if not options.get("cpp_wrapper") or not _can_be_kept(graph):
        return _torch.induce(graph, inputs, options)[0]
    try:
        run = _torch.entry_of(kept(name_of("compiled", _facts(graph, inputs, options)), build))
        if not made or _agree(made[0][0], run, inputs):
            return run
    except (NotKept, NoFolder, ImportError, AttributeError, _torch.Missing):
        if not made:  # nothing was compiled: no folder takes files, or what is there does not load
            return _torch.induce(graph, inputs, options)[0]
    return made[0][0]


class NotKept(Exception):
    """What was compiled is not all in one library."""


def _can_be_kept(graph: GraphModule) -> bool:
    """Whether a graph is nothing but operators of its inputs: no constants, nothing written, no random numbers."""
    if not keeps():
        return False
    return all(
        node.op in ("placeholder", "output")
        or (
            node.op == "call_function"
            and not fusion.writes(node)
            and not (isinstance(node.target, OPERATOR) and is_random(node.target))
        )
        for node in graph.graph.nodes
    )


def _facts(graph: GraphModule, inputs: Sequence[Tensor], options: dict) -> list[str]:
    """All that the library depends on."""
    nodes = (f"{n.op} {n.name} {n.target} {n.args} {n.kwargs}" for n in graph.graph.nodes)
    tensors = (f"{t.dtype} {t.device} {tuple(t.shape)} {t.stride()}" for t in inputs)
    asked = (f"{name}={value}" for name, value in os.environ.items() if name.startswith("TORCHINDUCTOR_"))
    modes = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
    )
    versions = (torch.__version__, str(torch.version.git_version), str(sys.implementation.cache_tag))
    settings = (repr(sorted(options.items())), repr(modes))
    return [
        *nodes,
        *tensors,
        *sorted(a for a in asked if "CACHE_DIR" not in a),
        *settings,
        *versions,
        *machine(),
    ]


def _agree(function: Callable, run: Callable, inputs: Sequence[Tensor]) -> bool:
    """Whether the library alone gives what the backend's function does, to the bit: that may do more than call it."""
    with fork_rng(devices=[]), torch.no_grad(), suppress(Exception):
        one, other = (f(*[tensor.clone() for tensor in inputs]) for f in (function, run))
        return len(one) == len(other) and all(
            a.stride() == b.stride() and torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(one, other)
        )
    return False
