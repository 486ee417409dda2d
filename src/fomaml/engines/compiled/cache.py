"""The compiled functions of a learner, each found again by all that it depends on."""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fomaml.engines import _torch
from fomaml.engines.common import first_line, out_of_memory
from fomaml.engines.cpu.build import NO_COMPILER, compiler
from fomaml.errors import InputError
from fomaml.layout import Strides
from fomaml.learning.learner import MetaLearner
from fomaml.tasks import Task, count, device_of, shape_of

if TYPE_CHECKING:  # with all that compiling needs of torch: loaded below, where its absence is a warning
    from fomaml.engines.compiled.trace import Compiled, Find


def function(
    learner: MetaLearner,
    tasks: Task,
    find: Find,
    facts: tuple,
    alone: Find | None = None,
    side_by_side: bool = False,
    others: Iterable[Task] = (),
    again: bool = True,
    plainly: bool = False,
) -> Made:
    """`find` compiled for chunks of this shape, the same at every call. Where several tasks are out of memory, that
    error goes through.

    find: what is found of a chunk of tasks. facts: what it depends on beside the learner and
        the shapes.
    alone: finds the same for a chunk of one task; given where convolutions on a CPU are to be stacked.
    side_by_side: there are chunks for all threads, so that on a CPU each can take its own.
    others: chunks of the same meta-batch, to compare with the eager engine where this one does not settle it.
    again: compile anew where something has changed that is built in.
    plainly: without torch's compiler, which takes seconds: its operators are called one after the other.
    """
    watched, changed = _current(learner, again)
    if watched is None:
        return Made(None, f"{changed} has changed since it was compiled")
    judge = learner.criterion if learner.loss is None else learner.loss
    parts = (learner.optimizer, learner.objective, judge, learner.output, learner.start)
    key = Key(
        facts,
        side_by_side,
        learner.first_order(learner.iteration) if callable(learner.first_order) else learner.first_order,
        learner.inner_steps,
        (learner.inner_batch_size, learner.inner_accumulate),
        tuple(learner.adapted),
        tuple(learner.meta_learned),
        tuple(learner.inner_lr.sizes.items()),
        tuple([module.training for module in watched.modules]),
        tuple([(own.dtype, own.requires_grad, own.stride()) for own in watched.parameters]),
        shape_of(tasks),
        tuple(map(id, parts)),
    )
    found = watched.known.get(key)  # once: the key's hash takes a hundredth of a small compiled meta-gradient
    if found is None:
        found = _made(learner, tasks, find, alone, side_by_side, others, plainly)
        found.parts = parts
        watched.known[key] = found
        watched.settle()
    return found


@dataclass
class Made:
    """What came of compiling. function: None where it cannot be. why: it cannot be, or was not compared with the eager
    engine; "" where the two agree. parts: held, so that their ids stay theirs. told: in a warning.
    """

    function: Compiled | None
    why: str = ""
    parts: tuple = ()
    told: bool = False

    def warning(self) -> str:
        """What to say where compiling was asked for; "" where all is well or was said before."""
        if self.told or not self.why:
            return ""
        self.told = True
        if self.function is not None:
            return f"compile=True runs what was not compared with the eager engine: {self.why}"
        return self.why if self.why == too_old() else f"compile=True runs uncompiled: {self.why}"


class Key(NamedTuple):
    """What a compiled function depends on, beside the values of parameters and buffers.

    facts, side_by_side: see `function`. first_order, …, adapted, meta_learned: the learner's, as they are now;
    inner_sizes: of mini-batches and of parts.
    rates: the constant step sizes by name. modes: `training` of each module. kinds: dtype, `requires_grad` and strides
    of each parameter. tensors: see `shape_of`, of a chunk. parts: the ids of the learner's optimiser, objective,
    criterion or loss, output and start.
    """

    facts: tuple
    side_by_side: bool
    first_order: bool
    inner_steps: int
    inner_sizes: tuple[int | None, int | None]
    adapted: tuple[str, ...]
    meta_learned: tuple[str, ...]
    rates: tuple[tuple[str, float], ...]
    modes: tuple[bool, ...]
    kinds: tuple[tuple[torch.dtype, bool, Strides], ...]
    tensors: tuple
    parts: tuple[int, ...]


def _made(learner, tasks, find, alone, side_by_side, others, plainly) -> Made:
    """What is compiled, once it was seen to agree with the eager engine."""
    reason = too_old()
    if reason:
        return Made(None, reason)
    try:
        from fomaml.engines.compiled.trace import Compiled
        from fomaml.engines.compiled.trust import compare

        _torch.check_hooks(learner)
        made = Compiled(learner, tasks, find, alone, side_by_side, plainly)
        return Made(made, compare(learner, made, find, tasks, others))
    except InputError:
        raise
    except Exception as error:  # the compilers' errors have no common base
        if count(tasks) > 1 and out_of_memory(error):
            raise  # fewer tasks at once may do
        reason = first_line(error)
        if _torch.depends_on_values(error):
            reason = f"what {reason} gives depends on values, which a trace does not have"
        elif device_of(tasks).type == "cpu" and not compiler():
            reason = NO_COMPILER
    return Made(None, reason)


OLDEST = (2, 7)  # the first torch on which every kind of compiled function works, see runs/torch_versions.sh


def too_old() -> str:
    """What to say where this torch is older than any that compiles; else ""."""
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release >= OLDEST:
        return ""
    return f"compile=True needs torch >= {'.'.join(map(str, OLDEST))}, this is {torch.__version__}: runs uncompiled"


# --- what changes -----------------------------------------------------------------------------------


def _current(learner: MetaLearner, again: bool) -> tuple[Watched | None, str]:
    """What was compiled for a learner whose modules are as they were; nothing yet where one has changed, and None where
    it is not to be compiled again. And what has changed.
    """
    watched = _watched.get(learner)
    changed = watched.changed() if watched else ""
    if changed and not again:
        return None, changed
    if watched is None or changed:
        times = watched.times + 1 if watched else 0
        if times == MANY_TIMES:
            text = (
                f"{changed} has changed {times} times; what is compiled has it built in, and is compiled anew: "
                "make it a buffer, or use compile=False"
            )
            # in the line that called `meta_gradient` or a plan
            warnings.warn(text, RuntimeWarning, stacklevel=6)
        watched = _watched[learner] = Watched(learner, times)
    return watched, changed


class Watched:
    """What was compiled for a learner, and its modules as they were then.

    known: the functions by what they depend on. modules, parameters: kept since walking through them would take a tenth
    of a small compiled meta-gradient. times: how often something had changed before.
    """

    def __init__(self, learner: MetaLearner, times: int = 0):
        self.known: dict[tuple, Made] = {}
        self.times = times
        self.modules = tuple(learner.modules())[1:]
        self.parameters = tuple(learner.parameters())
        self._no_hooks: list[dict] = []
        self._attributes: list[tuple] = []  # name, where it is, key, value
        self._containers: list[tuple] = []  # name, container, a copy
        self._nested: list[tuple] = []  # name, container, what is in it
        self._judge = learner.criterion if learner.loss is None else learner.loss
        self._values = values_of(self._judge)
        for module_name, module in learner.named_modules():
            own = vars(module)
            self._no_hooks += [own[name] for name in _torch.HOOKS if name in own and not own[name]]
            keys = [] if module is learner else [key for key in own if key not in OF_ALL_MODULES]
            for key in (*filter(own.get, ("_modules", *_torch.HOOKS)), *keys):
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
        if self._values:
            for (name, then), (_, now) in zip(self._values, values_of(self._judge)):
                if not _same(now, then):
                    return f"{name!r}, which the loss reads,"
        return next((name for name, now, then in self._nested if not _same(_content(now), then)), "")

    def settle(self) -> None:
        """Watch no more what the trace has changed: the forward pass writes it itself."""
        self._no_hooks = [hooks for hooks in self._no_hooks if not hooks]
        while name := self.changed():
            for kind in (self._attributes, self._containers, self._nested):
                kind[:] = [each for each in kind if each[0] != name]


OF_ALL_MODULES = frozenset(vars(nn.Module()))
CONTAINERS = dict | list | tuple | set
PLAIN = int | float | complex | str | bytes | None
MANY_TIMES = 5


def values_of(function: Any) -> list[tuple[str, Any]]:
    """By name, what a criterion or loss of one's own reads beside its arguments: variables around it and global ones,
    arguments of a `functools.partial`, attributes of an object.
    """
    if isinstance(function, functools.partial):
        own = [(name, _content(value)) for name, value in function.keywords.items()]
        return own + [("an argument", _content(value)) for value in function.args] + values_of(function.func)
    if isinstance(function, types.MethodType):
        return values_of(function.__self__) + values_of(function.__func__)
    if isinstance(function, types.FunctionType):
        if function.__module__ is not None and function.__module__.partition(".")[0] == "torch":
            return []
        code = function.__code__
        cells = zip(code.co_freevars, function.__closure__ or ())
        around = [(name, cell.cell_contents) for name, cell in cells if cell != types.CellType()]
        outer = [(n, function.__globals__[n]) for n in code.co_names if n in function.__globals__]
        return [(n, _content(v)) for n, v in (*around, *outer) if isinstance(v, CONTAINERS | PLAIN)]
    if isinstance(function, nn.Module | types.BuiltinFunctionType) or not hasattr(function, "__dict__"):
        return []  # those of modules are watched already
    return [(name, _content(value)) for name, value in vars(function).items()]


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


_watched: WeakKeyDictionary[MetaLearner, Watched] = WeakKeyDictionary()
