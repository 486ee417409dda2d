"""Replicas of a module that hold other tensors, those of one task: what runs later still finds them there.

A replica shares everything with its module but the tensors it holds. The module itself is not left changed. What is
made in a forward pass of a replica, and runs after it, such as the second forward pass of `torch.utils.checkpoint` or
a hook of the backward pass, computes with the task's tensors whenever it runs.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fomaml.errors import InputError, in_one_line
from fomaml.learning.admission import ReadsRefused, calls_refused, check_module
from fomaml.learning.contracts import module_of
from fomaml.learning.moving import PLAIN, Move, parts
from fomaml.learning.weight_norm import written_out
from fomaml.models import NATIVE_NORMS, BatchNorm

Module = TypeVar("Module", bound=nn.Module)
NORMS = (*NATIVE_NORMS, BatchNorm)
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

    parameters, buffers: those of the module by name, each once.

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
        of_criterion = module_of(criterion)
        if of_criterion is not None:
            self.modules += [module for module in of_criterion.modules() if module not in own]
        self._evaluating = evaluating
        self.index = {id(module): number for number, module in enumerate(self.modules)}
        self.parameters, self.buffers = dict(model.named_parameters()), dict(model.named_buffers())
        named = self.parameters | self.buffers
        self.names = {id(tensor): name for name, tensor in named.items()}
        for name, buffer in buffers_of(criterion).items():
            self.names.setdefault(id(buffer), name)
        prefixes = {id(module): prefix for prefix, module in reversed([*model.named_modules()])}
        self._slots = [
            (
                [(key, self.names.get(id(tensor)), tensor) for key, tensor in module._parameters.items()],
                [
                    # one that is None yet may be filled by the forward pass
                    (key, f"{prefixes[id(module)]}.{key}".lstrip("."), None)
                    if tensor is None and id(module) in prefixes
                    else (key, self.names.get(id(tensor)), tensor)
                    for key, tensor in module._buffers.items()
                ],
            )
            for module in self.modules
        ]
        self._scripted = [isinstance(module, torch.jit.ScriptModule) for module in self.modules]
        self.own = {id(module) for module, scripted in zip(self.modules, self._scripted) if not scripted}
        self._keys = [
            set() if scripted else {*module._modules, *module._parameters}
            for module, scripted in zip(self.modules, self._scripted)
        ]
        placed = {name for slots in self._slots for slot in slots for _, name, _ in slot}
        elsewhere = [name for name in named if name not in placed]
        if elsewhere:
            raise InputError(
                f"the parameter {elsewhere[0]!r} is named by the module, and in none of its submodules: give the "
                "module that holds it, or make that a submodule"
            )
        self._criterion = criterion
        self._moves_criterion = self.refers(criterion)
        self._attributes = [self._known(vars(module)) for module in self.modules]
        # what forward writes into them is of one step, as what it sets on self is
        self._containers = [
            [
                (key, value)
                for key, value in vars(module).items()
                if key not in OF_ALL_MODULES and type(value) in (dict, list, set, deque, OrderedDict)
            ]
            for module in self.modules
        ]
        self._as_it_was = True  # no forward pass has left anything on the module
        self._hooked = any(vars(module).get("_backward_hooks") for module in self.modules)
        self.training: bool | None = None  # of all modules, where it is not their own
        self._written_out = [
            (number, found)
            for number, module in enumerate(self.modules if open else ())
            if (found := written_out(module))
        ]
        # which takes a part of the time of a short adaptation
        self._watched = watched and not all(map(_reads_itself_alone, self.modules))
        self._kept: tuple[tuple, list[nn.Module]] | None = None
        self._anew: set[int] | None = None

    def keep(self) -> None:
        """From now on take replicas again where the tensors are the same ones, but for those that the forward pass of
        a module of the user's may write into, and what holds them.
        """
        writing = [module for module in self.modules if not _reads_itself_alone(module)]
        anew = {id(each): True for module in writing for each in module.modules()}

        def is_anew(module: nn.Module) -> bool:
            if id(module) not in anew:
                children = [child for child in module._modules.values() if child is not None]
                anew[id(module)] = any([*map(is_anew, children)])
            return anew[id(module)]

        found = {number for number, module in enumerate(self.modules) if is_anew(module)}
        if not any(own for number, own in enumerate(self._attributes) if number not in found):
            self._anew = found

    def make(self, tensors: Mapping[str, Tensor]) -> list[nn.Module]:
        """Replicas of all modules, the root's first, that hold these tensors in place of the parameters and buffers of
        their names. Others are the module's own; a tensor that has several names goes by the first.
        """
        held = (self.training, *tensors.values())
        kept, anew = self._kept, range(len(self.modules)) if self._anew is None else self._anew
        if kept is not None and len(held) == len(kept[0]) and all(map(is_, held, kept[0])):
            found = [*kept[1]]
        else:
            found, anew = [*self.modules], range(len(self.modules))
        for number in anew:
            if not self._scripted[number]:  # which has no tensors, see `check_module`
                found[number] = object.__new__(type(self.modules[number]))
        for number in anew:
            replica, module, slots = found[number], self.modules[number], self._slots[number]
            attributes, containers = self._attributes[number], self._containers[number]
            if replica is module:
                continue
            own = replica.__dict__
            own.update(module.__dict__)
            own["_original"] = module
            if self.training is not None:
                own["training"] = self.training
            elif self._evaluating and not isinstance(module, NORMS):
                own["training"] = False
            own["_parameters"], own["_buffers"] = (
                {key: tensor if name is None else tensors.get(name, tensor) for key, name, tensor in slot}
                for slot in slots
            )
            own["_modules"] = {
                key: None if child is None else found[self.index[id(child)]]
                for key, child in module._modules.items()
            }
            for key, value in containers:
                own[key] = value.copy()
            # of `Module.compile`, which has the module's tensors built in
            own.pop("_compiled_call_impl", None)
            for key, value in attributes:
                own[key] = Move(self, found, tensors)(value)
        for number, attributes in self._written_out:
            found[number].__dict__.update(attributes)
        if self._anew is not None:
            self._kept = held, found
        return found

    @contextmanager
    def holding(
        self, tensors: Mapping[str, Tensor], buffers: MutableMapping[str, Tensor], keep: bool = False
    ) -> Iterator[tuple[Callable, Any]]:
        """The forward pass with these tensors and buffers; within the block the module itself has them too, and all
        that the forward pass has set, for a criterion that looks at the module.

        A buffer that the forward pass assigns takes its place in `buffers`. keep: what else it has set on the module,
        such as a term of the loss, stays there. The forward pass comes with the criterion, which knows the replica
        where it knew the module.
        """
        tensors = {**tensors, **buffers}
        replicas = self.make(tensors)
        before = [module.__dict__ for module in self.modules]
        try:
            for module, replica in zip(self.modules, replicas):
                object.__setattr__(module, "__dict__", replica.__dict__)
            criterion = self._criterion
            if self._moves_criterion:
                criterion = Move(self, replicas, tensors)(criterion)
            yield functools.partial(self._run, replicas, tensors), criterion
            self.assigned(replicas, buffers)
        finally:
            for module, own, attributes in zip(self.modules, before, self._attributes):
                after = module.__dict__
                object.__setattr__(module, "__dict__", own)
                if keep:
                    self._as_it_was = False
                    moved = OF_ALL_MODULES.union(["_original"], (key for key, _ in attributes))
                    own.update((key, value) for key, value in after.items() if key not in moved)

    def assigned(self, replicas: list[nn.Module], buffers: MutableMapping[str, Tensor]) -> None:
        """Have `buffers` hold those that a forward pass has assigned."""
        for replica, (_, slots) in zip(replicas, self._slots):
            for key, name, _ in slots:
                held = replica._buffers.get(key)
                if name is not None and held is not None and held is not buffers.get(name):
                    buffers[name] = held.detach()

    @property
    def all_kept(self) -> bool:
        """Whether all are taken again, as nothing that runs in a forward pass is the user's."""
        return self._anew == set()

    def duplicate(self, parameters: Mapping[str, Tensor] | None = None) -> nn.Module:
        """An independent copy of the module, which keeps neither what a tensor of it was computed from, as
        `torch.nn.utils.weight_norm` does, nor functions that know the module itself.

        parameters: tensors that nobody else holds, which the parameters of these names become without a copy.
        """
        memo: dict[int, Any] = {}
        for name, value in (parameters or {}).items():
            own = self.modules[0].get_parameter(name)
            same = (own.shape, own.stride(), own.dtype) == (value.shape, value.stride(), value.dtype)
            if same and type(own) is nn.Parameter and not same_memory(value, own):
                memo[id(own)] = nn.Parameter(value, own.requires_grad)
        for module in self.modules:
            for value in vars(module).values():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    memo[id(value)] = value.detach().clone()
        try:
            copied = _deepcopied(self.modules[0], memo)
        except (TypeError, RuntimeError) as error:
            raise InputError(f"the module cannot be copied: {in_one_line(error)}") from error
        if self._as_it_was and not any(self._attributes):
            return copied
        modules = list(copied.modules())
        tensors = dict(chain(copied.named_parameters(), copied.named_buffers()))
        for module in modules:
            own = vars(module)
            for key, value in self._known(own):
                own[key] = Move(self, modules, tensors)(value)
        return copied

    def _run(self, replicas, tensors, *args, **kwargs):
        if self._watched:
            replaced = self._replaced(tensors)
            with calls_refused(self.own), ReadsRefused(replaced):
                found = replicas[0](*args, **kwargs)
            self._watched = not replaced  # once is enough, and takes a part of the time of a small module
            for keys, replica, scripted in zip(self._keys, replicas, self._scripted):
                made = set() if scripted else {*replica._modules, *replica._parameters} - keys
                if made:
                    raise InputError(
                        f"forward makes {min(made)!r}, a layer or a parameter, where there was none, so it would be "
                        "made anew in each step and never learn: run the module once on a batch before"
                    )
        else:
            found = replicas[0](*args, **kwargs)
        if self._hooked and isinstance(found, Tensor) and found.grad_fn is not None:
            found.grad_fn.metadata["replicas"] = replicas  # hooks hold the modules they are of weakly
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
        held = parts(value)
        if set(map(type, held)) <= PLAIN:
            return False
        seen = set() if seen is None else seen
        if id(value) in seen:
            return False
        seen.add(id(value))
        return any(type(part) not in PLAIN and self.refers(part, seen) for part in held)


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors begin at one address; those that have none, as wrappers of others, do not."""
    place = one.data_ptr()
    return place != 0 and place == other.data_ptr()


def _deepcopied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy`, which takes a tenth of the time of a small adaptation for what is the same in both."""
    if id(module) in memo:
        return memo[id(module)]
    kind: Any = type(module)
    if _copies_itself(kind):
        return copy.deepcopy(module, memo)
    memo[id(module)] = made = object.__new__(type(module))
    for key, value in vars(module).items():
        if key == "_compiled_call_impl":  # which `nn.Module` leaves out too
            continue
        if type(value) in PLAIN or (type(value) is tuple and set(map(type, value)) <= PLAIN):
            pass
        elif type(value) in (dict, OrderedDict, set) and not value:
            value = value.copy()
        elif key == "_modules":
            value = {
                name: None if child is None else _deepcopied(child, memo) for name, child in value.items()
            }
        elif key == "_parameters" and type(value) is dict:
            value = {name: copy.deepcopy(tensor, memo) for name, tensor in value.items()}
        else:
            value = copy.deepcopy(value, memo)
        made.__dict__[key] = value
    return made


def _reads_itself_alone(module: nn.Module) -> bool:
    """Whether nothing that runs in a forward pass is the user's, so that it finds all by `self`."""
    own = vars(module)
    hooked = own.get("_forward_hooks") or own.get("_forward_pre_hooks") or "forward" in own
    return not hooked and type(module).__module__.startswith(("torch.nn.modules.", "fomaml.models"))


@functools.lru_cache
def _copies_itself(kind: type) -> bool:
    """Whether modules of this kind say how they are copied, so that it is not enough to copy what they hold."""
    names = {"__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__slots__"}
    own = [vars(each) for each in kind.__mro__ if each not in (nn.Module, object)]
    # torch's fill in what modules of earlier releases lack
    loads = (each.get("__setstate__") for each in own)
    others = any(each and not each.__module__.startswith("torch.nn.") for each in loads)
    return others or any(names & each.keys() for each in own)


def buffers_of(criterion: Any) -> dict[str, Tensor]:
    """The buffers of a criterion that is a module, each task's own as the model's are."""
    module = module_of(criterion)
    if module is None:
        return {}
    return {f"criterion/{name}": buffer for name, buffer in module.named_buffers()}


def original(module: Module) -> Module:
    """The module that this is a replica of, or itself."""
    return vars(module).get("_original", module)
