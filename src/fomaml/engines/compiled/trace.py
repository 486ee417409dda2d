"""Any engine's meta-gradient as one compiled function, by shape.

Forward passes, inner steps and autograd's own backward passes are traced into one graph of plain tensor
operations, which `torch.compile`'s backend fuses; no autograd graph is recorded when it runs.
"""

from __future__ import annotations

import ast
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule

from fomaml.devices import forked_random
from fomaml.engines import _torch
from fomaml.engines.common import strides_of
from fomaml.engines.compiled import kept, products, programs, values
from fomaml.engines.compiled.replay import Replayed
from fomaml.engines.cpu import fusion, kernels, lifted
from fomaml.engines.cpu.build import library
from fomaml.engines.cpu.threads import on_one_thread, one_by_one, side_by_side
from fomaml.engines.watching import is_random
from fomaml.errors import InputError
from fomaml.learning.learner import MetaLearner
from fomaml.tasks import Task, chunks, count, device_of, tensors_of
from fomaml.threads import alone
from fomaml.trees import Tree, leaves, mapped, rebuilt

# a chunk → what is found of it, a named tuple: first a list of tensors, sums over tasks; the rest (tasks, ...) each
Find = Callable[[Task], Any]
FEW_OPERATIONS = 10_000_000  # with a second thread, 6 million took 1.3 times as long


class Compiled:
    """A compiled `find` for chunks of one shape; see `cache.function`.

    draws: it draws random numbers; draws_its_own: ones that are others than the eager engine's.
    calls_before: so many calls are made before what is compiled runs as it will for good. strides: see `strides_of`.
    """

    def __init__(
        self,
        learner: MetaLearner,
        tasks: Task,
        find: Find,
        alone: Find | None = None,
        side_by_side: bool = False,
        plainly: bool = False,
    ):
        holder = Holder(learner)
        tensors = dict(holder.named_parameters()) | dict(holder.named_buffers())
        learned = {name for name, tensor in tensors.items() if tensor.requires_grad}
        self._slots = [_slot(holder, name) for name in tensors]
        self.strides = strides_of(learner)
        self._channels_last: set[int] = set()
        self._side_by_side = False
        self._on_one_thread = False
        self._memory: kernels.Memory | None = None
        self._replayed = False
        self.draws = self.draws_its_own = False
        self.calls_before = 0
        self._summed = 0  # so many of the results, the first
        self._kind: Callable[..., Any] = tuple
        self._rest: Tree = ()  # how the others are nested

        def trace(find: Find, tasks: Task) -> GraphModule:
            def flat(*arguments: Tensor) -> list[Tensor]:
                values, examples = arguments[: len(tensors)], arguments[len(tensors) :]
                state = {
                    name: value.detach().requires_grad_() if name in learned else value
                    for name, value in zip(tensors, values)
                }
                chunk = rebuilt(tasks, iter(examples))
                found = holder.at(state, chunk, find)
                summed, *rest = found
                optional = type(found)._field_defaults
                while type(found)._fields[len(rest)] in optional and not leaves(rest[-1]):
                    rest.pop()  # which is quicker to put together without it
                self._summed, self._kind, self._rest = len(summed), type(found), tuple(rest)
                return [*(tensor.detach() for tensor in summed), *leaves(self._rest)]

            with torch.enable_grad():
                return _torch.trace(flat, *self._state(), *_tensors(tasks))

        device = device_of(tasks).type
        on_cpu = device == "cpu"
        with forked_random(), torch.no_grad(), _nothing_old_is_garbage():
            self._run = None if alone is None else self._stacked(trace, alone, tasks, plainly)
            if self._run is None:
                graph = trace(find, tasks)
                if on_cpu and self._fuse(graph, stacked=plainly):
                    if plainly and not side_by_side and not self.draws:
                        self._on_one_thread = not lifted.by_kernels(graph)
                        self._memory = kernels.Memory()
                    self._run = graph
                else:
                    self.draws = _draws(graph)
                    self._side_by_side = on_cpu and side_by_side and not self.draws
                    plainly = plainly or (device == "cuda" and not _torch.has_triton())
                    self._run = self._as_traced(graph) if plainly else self._induced(graph, tasks, device)
                    self.draws_its_own = self.draws and not plainly
                del graph
            if isinstance(self._run, GraphModule):
                self._run = _forward(self._run)
            if plainly and device == "cuda":
                self._run, self.calls_before = Replayed(self._run, len(tensors)), 1
            # its structure alone
            self._rest = mapped(lambda tensor: tensor.new_empty(0), self._rest)
            self._flat = all(isinstance(part, Tensor) for part in self._rest)
            gc.collect()  # the graphs, whose nodes refer to each other

    def _fuse(self, graph: GraphModule, stacked: bool) -> bool:
        """Rewrite a function with convolutions, if it is one. stacked: for kernels of convolutions too."""
        if not fusion.convolutional(graph.graph):
            return False
        for dtype in {node.meta["val"].dtype for node in graph.graph.nodes if node.op == "placeholder"}:
            if dtype in kernels.NAMES:
                library(kernels.NAMES[dtype], stacked)
        self.draws = _draws(graph)
        self._side_by_side = not self.draws
        self._channels_last = fusion.rewrite(graph)
        return True

    def _stacked(self, trace: Callable, alone: Find, tasks: Task, plainly: bool) -> GraphModule | None:
        """The function of one task, stacked; None where that cannot be."""
        single = next(chunks(tasks, 1))
        graph = trace(alone, single)
        if self._fuse(graph, stacked=True) and self._side_by_side:
            state = self._state()
            with suppress(InputError, RuntimeError):
                found = lifted.lift(
                    graph, [*state, *_tensors(single)], len(state), self._summed, count(tasks)
                )
                self._memory = kernels.Memory() if count(tasks) > 1 or plainly else None
                return found
        self._channels_last, self._side_by_side = set(), False
        return None

    def _as_traced(self, graph: GraphModule) -> GraphModule:
        """The function by torch's own operators, one after the other, as traced, which `Replayed` records on CUDA."""
        products.rewrite(graph)
        products.call_less(graph)
        self._on_one_thread = products.operations(graph.graph) < FEW_OPERATIONS
        return graph

    def _induced(self, graph: GraphModule, tasks: Task, device: str) -> Callable:
        """The function by loops of our own where there are such for all of it, else by `torch.compile`'s backend. On
        CUDA the backend records its launches as a graph, which a GPU replays: the first call warms it up, the second is
        recorded.
        """
        on_cpu = device == "cpu"
        products.rewrite(graph)
        self._on_one_thread = on_cpu and products.operations(graph.graph) < FEW_OPERATIONS
        if on_cpu:
            threads = 1 if self._side_by_side or self._on_one_thread else torch.get_num_threads()
            with suppress(values.Unknown, _torch.Missing, RuntimeError):
                return programs.program(graph, threads)
        for node in graph.graph.nodes:
            node.meta.pop("val", None)  # of a fake mode that is not the compiler's
        # calls between kernels in C++: 1.1 times faster on F; they also leave the interpreter's lock to others
        options: dict = {"cpp_wrapper": True, "cpp_cache_precompile_headers": False} if on_cpu else {}
        if device == "cuda":
            options["triton.cudagraphs"] = True
            self._replayed, self.calls_before = True, 2
        if self._side_by_side or self._on_one_thread:
            options["cpp.threads"] = 1
        return kept.induced(graph, [*self._state(), *_tensors(tasks)], options)

    def map(self, chunks: Iterable[Task]) -> Iterator[Any]:
        """What is found for each chunk, at the learner's present state."""
        run = partial(self._call, self._state())
        if self._memory is not None:
            threads = 1 if self._on_one_thread else torch.get_num_threads()
            return one_by_one(run, chunks, self._memory, threads)
        if self._side_by_side:
            return side_by_side(run, chunks)
        return on_one_thread(run, chunks) if self._on_one_thread else map(run, chunks)

    def __call__(self, tasks: Task) -> Any:
        """What is found for one chunk that comes alone, with all of torch's threads where they help."""
        if self._memory is not None or self._on_one_thread:
            return next(iter(self.map([tasks])))
        return self._call(self._state(), tasks)

    def _call(self, state: list[Tensor], tasks: Task) -> Any:
        with torch.no_grad():
            if self._replayed:
                torch.compiler.cudagraph_mark_step_begin()
            found = self._run(*state, *_tensors(tasks))
            if self._replayed:
                found = [tensor.clone() for tensor in found]  # the next call writes over these
        summed, rest = found[: self._summed], found[self._summed :]
        return self._kind(summed, *(rest if self._flat else rebuilt(self._rest, iter(rest))))

    def _state(self) -> list[Tensor]:
        state = [owner[name].detach() for owner, name in self._slots]
        with alone(bool(self._channels_last)):  # or helpers of OpenMP would spin where kernels want to run
            for number in self._channels_last:
                state[number] = kernels.channels_last(state[number])
        return state


@contextmanager
def _nothing_old_is_garbage() -> Iterator[None]:
    """Within it the collector of garbage looks at what is new alone: a graph of thousands of nodes calls it often, and
    all that was imported took it a fifth of the time.
    """
    ours = not gc.get_freeze_count()
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def _forward(graph: GraphModule) -> Callable:
    """What it computes, without the graph, which takes more memory with every inner step and scatters what is
    kept over the heap.
    """
    constants = nn.Module()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            setattr(constants, node.target, getattr(graph, node.target))
    code = graph.graph.python_code("self")
    names = dict(code.globals)
    exec(compile(_in_few_variables(code.src), "<traced>", "exec"), names)
    return partial(names["forward"], constants)


def _in_few_variables(source: str) -> ast.Module:
    """The function of a graph, whose every result has a variable of its own until `name = None`, in as many variables
    as hold something at a time.

    Python keeps variables in pieces of 16 KB. A thousand of them fill one, and then each call from within maps and
    unmaps memory for the next: a fifth of ten inner steps, where the calls around were just so deep.
    """
    module = ast.parse(source)
    [function] = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    places = {argument.arg: argument.arg for argument in function.args.args}
    free: list[str] = []
    for statement in function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                node.id = places.get(node.id, node.id)
        if not isinstance(statement, ast.Assign):
            continue
        done = isinstance(statement.value, ast.Constant) and statement.value.value is None
        for target in statement.targets:
            assert isinstance(target, ast.Name)
            if not done:
                places[target.id] = target.id = free.pop() if free else target.id
            elif target.id in places:  # one with a type stays where it is
                target.id = places.pop(target.id)
                free.append(target.id)
    return module


def _draws(graph: GraphModule) -> bool:
    """Whether random numbers are drawn, which must be in the order of the tasks."""
    return any(is_random(node.target) for node in graph.graph.nodes)


def _tensors(tasks: Task) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors_of(tasks)]


class Holder(nn.Module):
    """Holds the learner so that its state can be swapped for the arguments of a trace."""

    def __init__(self, learner: MetaLearner):
        super().__init__()
        self.learner = learner

    def forward(self, tasks: Task, find: Find) -> Any:
        return find(tasks)

    def at(self, state: dict[str, Tensor], tasks: Task, find: Find) -> Any:
        """What is found where these are the learner's parameters and buffers; it has its own again afterwards.

        `functional_call` swaps those of a module that is reachable under two names twice, and puts the wrong ones back.
        """
        times = Counter(module for _, module in self.named_modules(remove_duplicate=False))
        shared = [module for module, number in times.items() if number > 1]
        own = [(slots, dict(slots)) for module in shared for slots in (module._parameters, module._buffers)]
        try:
            return functional_call(self, state, (tasks, find))
        finally:
            for slots, values in own:
                slots.update(values)


def _slot(module: nn.Module, name: str) -> tuple[dict[str, Tensor], str]:
    """Where a module keeps a parameter or buffer: a look-up in it is far quicker than `named_parameters()`."""
    owner, _, last = name.rpartition(".")
    owner = module.get_submodule(owner)
    return (owner._parameters if last in owner._parameters else owner._buffers), last
