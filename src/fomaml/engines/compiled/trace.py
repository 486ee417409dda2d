"""Any engine's meta-gradient as one compiled function, by shape.

Forward passes, inner steps and autograd's own backward passes are traced into one graph of plain tensor
operations, which `torch.compile`'s backend fuses; no autograd graph is recorded when it runs.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fomaml.engines.common import Found, first_line, is_random, out_of_memory
from fomaml.engines.compiled import products
from fomaml.engines.cpu import fusion, kernels, lifted
from fomaml.engines.cpu.threads import on_one_thread, one_by_one, side_by_side
from fomaml.errors import InputError
from fomaml.learning.adapt import call
from fomaml.learning.learner import MetaLearner
from fomaml.learning.objectives import MultiStepLoss
from fomaml.tasks import Examples, Task, chunks, count

Find = Callable[[Task], Found]


def function(
    learner: MetaLearner,
    tasks: Task,
    find: Find,
    facts: tuple,
    alone: Find | None = None,
    side_by_side: bool = False,
) -> Compiled | None:
    """`find` compiled for chunks of this shape, the same function at every call; None if it cannot be compiled,
    which a warning has then said. Where several tasks are out of memory, that error goes through.

    find: what `differentiate` finds for a chunk of tasks. facts: what it depends on beside the learner and
        the shapes.
    alone: finds the same for a chunk of one task; given where convolutions on a CPU are to be stacked.
    side_by_side: there are chunks for all threads, so that on a CPU each can take its own.

    Raises:
        InputError: the multi-step loss, whose weights change at every iteration.
    """
    if isinstance(learner.objective, MultiStepLoss):
        raise InputError(
            "compile=True does not take the multi-step loss: its weights change at every iteration"
        )
    watched = _watched.get(learner)
    changed = watched and watched.changed()
    if watched is None or changed:
        times = watched.times + 1 if watched else 0
        if times == MANY_TIMES:
            warnings.warn(
                f"{changed} has changed {times} times; what is compiled has it built in, and is compiled anew: "
                "make it a buffer, or use compile=False",
                RuntimeWarning,
                stacklevel=4,
            )
        watched = _watched[learner] = Watched(learner, times)
    known = watched.known
    order = learner.first_order(learner.iteration) if callable(learner.first_order) else learner.first_order
    like = tuple((tensor.shape, tensor.dtype, tensor.device) for part in tasks for tensor in part)
    modes = tuple([module.training for module in watched.modules])
    kinds = tuple([(parameter.dtype, parameter.requires_grad) for parameter in watched.parameters])
    sizes = tuple(getattr(learner.inner_lr, "sizes", {}).items())
    parts = (learner.optimizer, learner.objective, learner.criterion, learner.start)
    numbers = (learner.inner_steps, learner.inner_batch_size)
    names = (tuple(learner.adapted), tuple(learner.meta_learned))
    key = (facts, side_by_side, order, numbers, names, sizes, modes, kinds, like, *map(id, parts))
    found = known.get(key)  # once: the key's hash takes a hundredth of a small compiled meta-gradient
    if found is None:
        made = None
        try:
            made = Compiled(learner, tasks, find, alone, side_by_side)
        except InputError:
            raise
        except Exception as error:  # the compilers' errors have no common base
            if count(tasks) > 1 and out_of_memory(error):
                raise  # fewer tasks at once may do
            reason = first_line(error)
            if isinstance(error, DynamicOutputShapeException | DataDependentOutputException):
                reason = f"what {reason} gives depends on values, which a trace does not have"
            if tasks.support.inputs.device.type == "cpu" and not kernels.compiler():
                reason = "there is no C++ compiler on this machine"
            warnings.warn(f"compile=True runs uncompiled: {reason}", RuntimeWarning, stacklevel=4)
        found = known[key] = made, parts  # held, so that their ids stay theirs
        watched.settle()
    return found[0]


class Watched:
    """What was compiled for a learner, and its modules as they were then.

    known: the functions by what they depend on. modules, parameters: kept since walking through them would take a tenth
    of a small compiled meta-gradient. times: how often something had changed before.
    """

    def __init__(self, learner: MetaLearner, times: int = 0):
        self.known: dict[tuple, tuple] = {}
        self.times = times
        self.modules = tuple(learner.modules())[1:]
        self.parameters = tuple(learner.parameters())
        self._no_hooks: list[dict] = []
        self._attributes: list[tuple] = []  # name, where it is, key, value
        self._containers: list[tuple] = []  # name, container, a copy
        self._nested: list[tuple] = []  # name, container, what is in it
        for module_name, module in learner.named_modules():
            own = vars(module)
            self._no_hooks += [own[name] for name in HOOKS if not own[name]]
            keys = [] if module is learner else [key for key in own if key not in OF_ALL_MODULES]
            for key in (*filter(own.get, ("_modules", *HOOKS)), *keys):
                self._watch(f"{module_name}.{key}".removeprefix("model.").lstrip("."), own, key)

    def _watch(self, name: str, own: dict, key: str) -> None:
        value = own[key]
        self._attributes.append((name, own, key, value))
        if not isinstance(value, CONTAINERS):
            return
        content = _content(value)
        if not all(map(_compares, content)):
            self._nested.append((name, value, content))
        elif not isinstance(value, tuple):  # which is another if its content is
            self._containers.append((name, value, copy.copy(value)))

    def changed(self) -> str:
        """What was replaced or has other contents: an attribute of a module, its hooks and children too; else "".

        What was traced has them built in.
        """
        if any(self._no_hooks):
            return "a hook of a module"
        for name, own, key, value in self._attributes:
            now = own.get(key)
            if now is not value and not _same(_content(now), _content(value)):
                return name
        for name, now, then in self._containers:
            if now != then:
                return name
        return next((name for name, now, then in self._nested if not _same(_content(now), then)), "")

    def settle(self) -> None:
        """Watch no more what the trace has changed: the forward pass writes it itself."""
        self._no_hooks = [hooks for hooks in self._no_hooks if not hooks]
        while name := self.changed():
            for kind in (self._attributes, self._containers, self._nested):
                kind[:] = [each for each in kind if each[0] != name]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_ALL_MODULES = frozenset(vars(nn.Module()))
CONTAINERS = dict | list | tuple | set
PLAIN = int | float | complex | str | bytes | None
MANY_TIMES = 5
FEW_OPERATIONS = 10_000_000  # with a second thread, 6 million took 1.3 times as long


def _content(value):
    """What is in a container; any other value itself."""
    if isinstance(value, dict):
        return [*value, *map(_content, value.values())]
    return [*map(_content, value)] if isinstance(value, CONTAINERS) else value


def _same(now, then) -> bool:
    """Whether it is the same tensor, function or other object; plain values and contents may be equal ones."""
    if now is then:
        return True
    if type(now) is not type(then):
        return False
    if isinstance(now, list):
        return len(now) == len(then) and all(map(_same, now, then))
    return isinstance(now, PLAIN) and now == then


def _compares(value) -> bool:
    """Whether == says if it is the same: not so for tensors."""
    return isinstance(value, PLAIN) or type(value).__eq__ is object.__eq__


class Compiled:
    """A compiled `find`; see `function`. names: the meta-parameters' names, in the order of the gradients."""

    def __init__(
        self,
        learner: MetaLearner,
        tasks: Task,
        find: Find,
        alone: Find | None = None,
        side_by_side: bool = False,
    ):
        self.names = list(learner.meta_parameters())
        holder = _Holder(learner)
        tensors = dict(holder.named_parameters()) | dict(holder.named_buffers())
        learned = {name for name, tensor in tensors.items() if tensor.requires_grad}
        self._slots = [_slot(holder, name) for name in tensors]
        self._channels_last: set[int] = set()
        self._side_by_side = False
        self._on_one_thread = False
        self._memory: kernels.Memory | None = None

        def trace(find: Find, tasks: Task) -> GraphModule:
            def flat(*arguments: Tensor) -> list[Tensor]:
                values, examples = arguments[: len(tensors)], arguments[len(tensors) :]
                state = {
                    name: value.detach().requires_grad_() if name in learned else value
                    for name, value in zip(tensors, values)
                }
                chunk = Task(Examples(*examples[:2]), Examples(*examples[2:]))
                gradients, *seen = call(holder, state, (chunk, find))
                return [*(gradient.detach() for gradient in gradients), *seen]

            # one fake mode: by itself make_fx makes another for each node, which took more than half of its time
            shapes = FakeTensorMode(allow_fallback_kernels=True, allow_non_fake_inputs=True)
            with torch.enable_grad(), tracing(TracingContext(shapes)):
                # without data, or the trace holds that of several steps at once
                return make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(
                    *self._state(), *_tensors(tasks)
                )

        on_cpu = tasks.support.inputs.device.type == "cpu"
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            self._run = None if alone is None else self._stacked(trace, alone, tasks)
            if self._run is None:
                graph = trace(find, tasks)
                if on_cpu and self._fuse(graph):
                    self._run = graph
                else:
                    self._side_by_side = on_cpu and side_by_side and not _draws(graph)
                    self._run = self._induced(graph, tasks, on_cpu)
                del graph
            if isinstance(self._run, GraphModule):
                self._run = _forward(self._run)
            gc.collect()  # the graphs, whose nodes refer to each other
            self._call(self._state(), tasks)

    def _fuse(self, graph: GraphModule) -> bool:
        """Rewrite a function with convolutions, if it is one."""
        if not fusion.convolutional(graph.graph):
            return False
        kernels.library()
        self._side_by_side = not _draws(graph)
        self._channels_last = fusion.rewrite(graph)
        return True

    def _stacked(self, trace: Callable, alone: Find, tasks: Task) -> GraphModule | None:
        """The function of one task, stacked; None where that cannot be."""
        single = next(chunks(tasks, 1))
        graph = trace(alone, single)
        if self._fuse(graph) and self._side_by_side:
            state = self._state()
            with suppress(InputError, RuntimeError):
                found = lifted.lift(
                    graph, [*state, *_tensors(single)], len(state), len(self.names), count(tasks)
                )
                self._memory = kernels.Memory() if count(tasks) > 1 else None
                return found
        self._channels_last, self._side_by_side = set(), False
        return None

    def _induced(self, graph: GraphModule, tasks: Task, on_cpu: bool) -> Callable:
        """The function by `torch.compile`'s backend."""
        products.rewrite(graph)
        self._on_one_thread = on_cpu and products.operations(graph.graph) < FEW_OPERATIONS
        for node in graph.graph.nodes:
            node.meta.pop("val", None)  # of a fake mode that is not the compiler's
        # calls between kernels in C++: 1.1 times faster on F; they also leave the interpreter's lock to others
        options = {"cpp_wrapper": True} if on_cpu else {}
        if self._side_by_side or self._on_one_thread:
            options["cpp.threads"] = 1
        return torch._inductor.compile(graph, [*self._state(), *_tensors(tasks)], options)

    def map(self, chunks: Iterable[Task]) -> Iterator[Found]:
        """What is found for each chunk, at the learner's present state."""
        run = partial(self._call, self._state())
        if self._memory is not None:
            return one_by_one(run, chunks, self._memory)
        if self._side_by_side:
            return side_by_side(run, chunks)
        return on_one_thread(run, chunks) if self._on_one_thread else map(run, chunks)

    def _call(self, state: list[Tensor], tasks: Task) -> Found:
        with torch.no_grad():
            found = self._run(*state, *_tensors(tasks))
        return Found(found[: len(self.names)], *found[len(self.names) :])

    def _state(self) -> list[Tensor]:
        state = [owner[name].detach() for owner, name in self._slots]
        for number in self._channels_last:
            state[number] = kernels.channels_last(state[number])
        return state


def _forward(graph: GraphModule) -> Callable:
    """What it computes, without the graph, which takes more memory with every inner step and scatters what is
    kept over the heap.
    """
    constants = nn.Module()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            setattr(constants, node.target, getattr(graph, node.target))
    return partial(type(graph).forward, constants)


def _draws(graph: GraphModule) -> bool:
    """Whether random numbers are drawn, which must be in the order of the tasks."""
    return any(is_random(node.target) for node in graph.graph.nodes)


def _tensors(tasks: Task) -> list[Tensor]:
    return [tensor.contiguous() for part in tasks for tensor in part]


class _Holder(nn.Module):
    """Holds the learner so that `call` can swap its state for the arguments of a trace."""

    def __init__(self, learner: MetaLearner):
        super().__init__()
        self.learner = learner

    def forward(self, tasks: Task, find: Find) -> Found:
        return find(tasks)


def _slot(module: nn.Module, name: str) -> tuple[dict[str, Tensor], str]:
    """Where a module keeps a parameter or buffer: a look-up in it is far quicker than `named_parameters()`."""
    owner, _, last = name.rpartition(".")
    owner = module.get_submodule(owner)
    return (owner._parameters if last in owner._parameters else owner._buffers), last


_watched: WeakKeyDictionary[MetaLearner, Watched] = WeakKeyDictionary()
