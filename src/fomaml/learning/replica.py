"""Replicas of a module that hold other tensors, those of one task: what runs later still finds them there.

A replica shares everything with its module but the tensors it holds. The module itself is not left changed. What is
made in a forward pass of a replica, and runs after it, such as the second forward pass of `torch.utils.checkpoint` or
a hook of the backward pass, computes with the task's tensors whenever it runs.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from fomaml.errors import InputError
from fomaml.learning.weight_norm import written_out
from fomaml.models import NATIVE_NORMS, BatchNorm

Module = TypeVar("Module", bound=nn.Module)
NORMS = (*NATIVE_NORMS, BatchNorm)
PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})
OF_ALL_MODULES = frozenset(vars(nn.Module())) - {
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
}  # fmt: skip


class Replicas:
    """Makes replicas of a module as it is now.

    criterion: if it is a module, its parameters that are the module's own are replaced too.
    evaluating: all but batch norms are in evaluation mode, whatever the module's own is.
    open: weight norm is written out. The double backward of torch's own kernel is wrong on a CPU, where second order
        gets other gradients without an error (torch 2.6 to 2.14), and vmap has no rule for it.
    watched: look, at the first forward pass with other parameters, whether it reaches the module itself.

    Raises:
        InputError: a module that no replica can be made of, see `check_module`; at the first forward pass, one that
            calls a module of the tree itself, or reads a parameter that has another tensor in its place.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any = None,
        *,
        evaluating: bool = False,
        open: bool = False,
        watched: bool = True,
    ):
        check_module(model)
        self.modules = list(model.modules())
        own = set(self.modules)
        if isinstance(criterion, nn.Module):
            self.modules += [module for module in criterion.modules() if module not in own]
        self._evaluating = evaluating
        self.index = {id(module): number for number, module in enumerate(self.modules)}
        named = chain(model.named_parameters(), model.named_buffers())
        self.names = {id(tensor): name for name, tensor in named}
        self._slots = [
            tuple(
                [(key, self.names.get(id(tensor)), tensor) for key, tensor in slot.items()]
                for slot in (module._parameters, module._buffers)
            )
            for module in self.modules
        ]
        self._attributes = [self._known(vars(module)) for module in self.modules]
        self._written_out = [
            (number, found)
            for number, module in enumerate(self.modules if open else ())
            if (found := written_out(module))
        ]
        self._watched = watched

    def make(self, tensors: Mapping[str, Tensor]) -> list[nn.Module]:
        """Replicas of all modules, the root's first, that hold these tensors in place of the parameters and buffers of
        their names. Others are the module's own; a tensor that has several names goes by the first.
        """
        found = [object.__new__(type(module)) for module in self.modules]
        for replica, module, slots, attributes in zip(found, self.modules, self._slots, self._attributes):
            own = replica.__dict__
            own.update(module.__dict__)
            own["_original"] = module
            if self._evaluating and not isinstance(module, NORMS):
                own["training"] = False
            own["_parameters"], own["_buffers"] = (
                {key: tensor if name is None else tensors.get(name, tensor) for key, name, tensor in slot}
                for slot in slots
            )
            children = module._modules
            if children:
                own["_modules"] = {
                    key: None if child is None else found[self.index[id(child)]]
                    for key, child in children.items()
                }
            # of `Module.compile`, which has the module's tensors built in
            own.pop("_compiled_call_impl", None)
            for key, value in attributes:
                own[key] = _Move(self, found, tensors)(value)
        for number, attributes in self._written_out:
            found[number].__dict__.update(attributes)
        return found

    @contextmanager
    def holding(
        self, tensors: Mapping[str, Tensor], buffers: MutableMapping[str, Tensor], keep: bool = False
    ) -> Iterator[Callable]:
        """The forward pass with these tensors and buffers; within the block the module itself has them too, and all
        that the forward pass has set, for a criterion that looks at the module.

        A buffer that the forward pass assigns takes its place in `buffers`. keep: what else it has set on the module,
        such as a term of the loss, stays there.
        """
        tensors = {**tensors, **buffers}
        replicas = self.make(tensors)
        before = [module.__dict__ for module in self.modules]
        try:
            for module, replica in zip(self.modules, replicas):
                object.__setattr__(module, "__dict__", replica.__dict__)
            yield functools.partial(self._run, replicas, buffers, tensors)
        finally:
            for module, own, attributes in zip(self.modules, before, self._attributes):
                after = module.__dict__
                object.__setattr__(module, "__dict__", own)
                if keep:
                    moved = OF_ALL_MODULES.union(["_original"], (key for key, _ in attributes))
                    own.update((key, value) for key, value in after.items() if key not in moved)

    def duplicate(self) -> nn.Module:
        """An independent copy of the module, which keeps neither what a tensor of it was computed from, as
        `torch.nn.utils.weight_norm` does, nor functions that know the module itself.
        """
        memo: dict[int, Any] = {}
        for module in self.modules:
            for value in vars(module).values():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    memo[id(value)] = value.detach().clone()
        copied = copy.deepcopy(self.modules[0], memo)
        modules = list(copied.modules())
        tensors = dict(chain(copied.named_parameters(), copied.named_buffers()))
        for module in modules:
            own = vars(module)
            for key, value in self._known(own):
                own[key] = _Move(self, modules, tensors)(value)
        return copied

    def _run(self, replicas, buffers, tensors, *args, **kwargs):
        if self._watched:
            replaced = self._replaced(tensors)
            with _refusing(self.index), _Reads(replaced):
                found = replicas[0](*args, **kwargs)
            self._watched = not replaced  # once is enough, and takes a part of the time of a small module
        else:
            found = replicas[0](*args, **kwargs)
        for replica, (_, slots) in zip(replicas, self._slots):
            for key, name, _ in slots:
                if name is not None and replica._buffers.get(key) is not buffers.get(name) is not None:
                    buffers[name] = replica._buffers[key].detach()
        return found

    def _replaced(self, tensors: Mapping[str, Tensor]) -> dict[int, str]:
        """The names of the parameters that learn and have another tensor in their place, by their ids."""
        own = (slot for parameters, _ in self._slots for slot in parameters)
        return {
            id(tensor): name
            for _, name, tensor in own
            if name is not None and tensor is not None and tensor.requires_grad
            if tensors.get(name, tensor) is not tensor
        }

    # --- what refers to a module or a tensor of the tree ------------------------------------------

    def _known(self, attributes: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """The attributes of a module that refer to the tree."""
        return [
            (key, value)
            for key, value in attributes.items()
            if key not in OF_ALL_MODULES and type(value) not in PLAIN and self.refers(value)
        ]

    def refers(self, value: Any, seen: set[int] | None = None) -> bool:
        """Whether a module or tensor of the tree is in it, or a function that knows one."""
        if isinstance(value, Tensor):
            return id(value) in self.names
        if isinstance(value, nn.Module):
            return id(value) in self.index
        seen = set() if seen is None else seen
        if id(value) in seen:
            return False
        seen.add(id(value))
        parts = _parts(value)
        if len(parts) > 100 and set(map(type, parts)) <= PLAIN:
            return False
        return any(type(part) not in PLAIN and self.refers(part, seen) for part in parts)


class _Move:
    """Gives what refers to the tree of some replicas with other modules and tensors in its place.

    modules: in the order of those of the replicas. tensors: by name.
    """

    def __init__(self, replicas: Replicas, modules: list[nn.Module], tensors: Mapping[str, Tensor]):
        self._replicas, self._modules, self._tensors = replicas, modules, tensors
        self._done: dict[int, Any] = {}  # what refers to itself, as a function that calls itself does

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensors.get(self._replicas.names.get(id(value), ""), value)
        if isinstance(value, nn.Module):
            number = self._replicas.index.get(id(value), len(self._modules))
            return self._modules[number] if number < len(self._modules) else value
        if id(value) in self._done:
            return self._done[id(value)]
        if not self._replicas.refers(value):
            return value
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {key: self(part) for key, part in value.keywords.items()}
            return functools.partial(self(value.func), *map(self, value.args), **keywords)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, tuple):
            moved = map(self, value)
            return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
        self._done[id(value)] = found = copy.copy(value)
        found.clear()
        if isinstance(value, dict):
            found.update((self(key), self(part)) for key, part in value.items())
        else:
            (found.update if isinstance(value, set) else found.extend)(map(self, value))
        return found

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """A function whose variables from outside and defaults are moved."""
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        found = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, closure=cells or None
        )
        self._done[id(function)] = found
        for cell, own in zip(cells, function.__closure__ or ()):
            if _filled(own):
                cell.cell_contents = self(own.cell_contents)
        found.__defaults__ = function.__defaults__ and tuple(map(self, function.__defaults__))
        found.__kwdefaults__ = function.__kwdefaults__ and {
            key: self(part) for key, part in function.__kwdefaults__.items()
        }
        found.__dict__.update(function.__dict__)
        return found


def original(module: Module) -> Module:
    """The module that this is a replica of, or itself."""
    return vars(module).get("_original", module)


def _parts(value: Any) -> list:
    """What a container, a function or a bound method holds."""
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, list | tuple | set | deque) else []


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - a variable that was not assigned yet raises
    except ValueError:
        return False
    return True


@contextmanager
def _refusing(index: Mapping[int, int]) -> Iterator[None]:
    """Within it a forward pass that calls a module of the tree itself, and not its replica, is an `InputError`."""

    def refuse(module, args):
        if id(module) in index:
            raise InputError(
                f"the module calls its {type(module).__name__} by a reference that no copy of it follows, such as a "
                "global variable or an object of your own: call it as an attribute of self"
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


class _Reads(TorchFunctionMode):
    """Within it a forward pass that computes with a parameter of the module itself, and not with the tensor in its
    place, is an `InputError`.

    names: of these parameters, by their ids.
    """

    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self._names = names

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.requires_grad:
            for given in (*args, *(kwargs or {}).values()):
                for each in given if isinstance(given, list | tuple) else (given,):
                    if id(each) in self._names:
                        raise InputError(
                            f"the module reads its parameter {self._names[id(each)]!r} by a reference that no copy of "
                            "it follows, such as a global variable or an object of your own: read it as an attribute "
                            "of self"
                        )
        return found


# --- what no replica can be made of ---------------------------------------------------------------


def check_module(model: nn.Module) -> None:
    """Raise `InputError` for a module whose tensors cannot be replaced: a wrapper that keeps others of its own, such as
    `nn.parallel.DistributedDataParallel`, a compiled or a scripted module, a lazy one that has no shape yet, and one
    with a hook on the gradient of a parameter, which the gradients of replicas do not pass.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is an nn.Module, got a {type(model).__name__}")
    for name, module in model.named_modules():
        cure = _wrapper(module)
        if cure:
            what = f"the module {name!r}" if name else "the model"
            raise InputError(
                f"{what}, {type(module).__name__}, keeps its parameters from being replaced: {cure}"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(
                f"the lazy parameter {name!r} has no shape yet: run the module once on a batch before"
            )
        if parameter.is_inference():
            raise InputError(
                f"the parameter {name!r} was made in inference mode: make the module outside of it"
            )
        if type(parameter).__module__.startswith("torch.distributed"):
            raise InputError(
                f"the parameter {name!r} is spread over processes: give the module as it was before"
            )
        if parameter.requires_grad and getattr(parameter, "_backward_hooks", None):
            raise InputError(
                f"a hook on the gradient of the parameter {name!r}: gradients here are of a task's own copy of it, "
                "where the hook does not run; mask the parameter in forward instead (torch.nn.utils.parametrize)"
            )


def _wrapper(module: nn.Module) -> str:
    """What to give in place of a module that keeps its parameters to itself; "" for any other."""
    origin = type(module).__module__
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "give the module that it wraps, its .module"
    if origin.startswith("torch.distributed"):
        return "give the module that it wraps"
    if origin.startswith("torch._dynamo"):
        return "give the module that was compiled, its ._orig_mod, and compile=True where you train it"
    scripted = isinstance(module, torch.jit.ScriptModule)
    if scripted and any(True for _ in chain(module.parameters(), module.buffers())):
        return "give the module that it was made of"
    return ""
