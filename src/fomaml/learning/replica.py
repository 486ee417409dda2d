"""Replicas of a module that hold other tensors, those of one task: what runs later still finds them there.

A replica shares everything with its module but the tensors it holds. The module itself is not left changed. What is
made in a forward pass of a replica, and runs after it, such as the second forward pass of `torch.utils.checkpoint` or
a hook of the backward pass, computes with the task's tensors whenever it runs.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fomaml.errors import InputError, in_one_line
from fomaml.learning.admission import ReadsRefused, calls_refused, check_module
from fomaml.learning.closed import HOOKS, is_closed, is_torchs
from fomaml.learning.contracts import buffers_of, module_of
from fomaml.learning.copying import deepcopied, same_memory
from fomaml.learning.moving import PLAIN, Move, is_plain, parts
from fomaml.learning.weight_norm import written_out
from fomaml.models import NATIVE_NORMS, BatchNorm

Module = TypeVar("Module", bound=nn.Module)
Slot = tuple[str, str | None, Tensor | None]  # its key in the module, the name of what it holds, and that
NORMS = (*NATIVE_NORMS, BatchNorm)
OF_ALL_MODULES = frozenset(vars(nn.Module())).difference(HOOKS)


class _Kept(NamedTuple):
    """Replicas that are taken again. held: the mode and the tensors that they have. looks: at those that a forward pass
    may write into, by number, see `_look`.
    """

    held: tuple
    replicas: list[nn.Module]
    looks: dict[int, list]


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
        walked, self.parameters = check_module(model)
        prefixes = {id(module): prefix for prefix, module in reversed(walked)}
        self.modules = [module for _, module in walked]
        own = set(self.modules)
        of_criterion = module_of(criterion)
        if of_criterion is not None:
            self.modules += [module for module in of_criterion.modules() if module not in own]
        self._evaluating = evaluating
        self.index = {id(module): number for number, module in enumerate(self.modules)}
        self.buffers = dict(model.named_buffers())
        named = self.parameters | self.buffers
        self.names = {id(tensor): name for name, tensor in named.items()}
        for name, buffer in buffers_of(criterion).items():
            self.names.setdefault(id(buffer), name)
        self._slots: list[tuple[list[Slot], list[Slot]]] = [
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
        others = [_not_plain(vars(module)) for module in self.modules]
        self._attributes = [[(key, value) for key, value in own if self.refers(value)] for own in others]
        # what forward writes into them is of one step, as what it sets on self is
        self._containers = [
            [(key, value) for key, value in own if type(value) in (dict, list, set, deque, OrderedDict)]
            for own in others
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
        self._watched = watched and not all(map(is_closed, self.modules))
        self._may_make = watched and not all(map(is_torchs, self.modules))
        self._kept: _Kept | None = None
        self._looked_at: set[int] | None = None
        self._stays = False
        # what the modules themselves held, where a pass's stays
        self._before: list[dict[str, Any]] | None = None

    def keep(self) -> None:
        """From now on make replicas once, and have them hold other tensors; but for modules with attributes that refer
        to the tree. Those that the forward pass of a module of the user's may write into, and what holds them, become
        what they were, where it did.
        """
        writing = (module for module in self.modules if not is_torchs(module))
        looked_at = more = {self.index[id(each)] for module in writing for each in module.modules()}
        while more:
            more = {
                number
                for number, module in enumerate(self.modules)
                if number not in looked_at
                and any(self.index.get(id(child)) in looked_at for child in module._modules.values())
            }
            looked_at |= more
        if not any(own for number, own in enumerate(self._attributes) if number not in looked_at):
            self._looked_at = looked_at

    def make(self, tensors: Mapping[str, Tensor]) -> list[nn.Module]:
        """Replicas of all modules, the root's first, that hold these tensors in place of the parameters and buffers of
        their names. Others are the module's own; a tensor that has several names goes by the first.
        """
        held, kept = (self.training, *tensors.values()), self._kept
        anew: Iterable[int] = range(len(self.modules))
        looks: dict[int, list] = {}
        if kept is not None and kept.held[0] == self.training:
            found, looks = kept.replicas, kept.looks
            anew = [number for number, was in looks.items() if self._is_written(number, found[number], was)]
            if len(held) == len(kept.held) and all(map(is_, held, kept.held)):
                if not anew:
                    return found
            else:
                self._hold(found, tensors, looks)
        else:
            # a scripted one has no tensors, see `check_module`
            found = [
                module if scripted else object.__new__(type(module))
                for module, scripted in zip(self.modules, self._scripted)
            ]
        for number in anew:
            replica, module, slots = found[number], self.modules[number], self._slots[number]
            if replica is module:
                continue
            own = replica.__dict__
            own.clear()
            given = module.__dict__ if self._before is None else self._before[number]
            own.update(given)
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
                for key, child in given["_modules"].items()
            }
            for key, value in self._containers[number]:
                own[key] = value.copy()
            # of `Module.compile`, which has the module's tensors built in
            own.pop("_compiled_call_impl", None)
            for key, value in self._attributes[number]:
                own[key] = Move(self, found, tensors)(value)
        for number, attributes in self._written_out:
            found[number].__dict__.update(attributes)
        if self._looked_at is not None:
            looks |= {
                number: _look(found[number])
                for number in self._looked_at.intersection(anew)
                if not self._scripted[number]
            }
            self._kept = _Kept(held, found, looks)
        return found

    def _hold(self, found: list[nn.Module], tensors: Mapping[str, Tensor], looks: dict[int, list]) -> None:
        """Have replicas hold these tensors in place of others."""
        for number, slots in enumerate(self._slots):
            own = found[number].__dict__
            named = False
            for place, slot in zip(("_parameters", "_buffers"), slots):
                for key, name, tensor in slot:
                    if name is not None:
                        own[place][key] = tensors.get(name, tensor)
                        named = True
            if named and number in looks:
                looks[number] = _look(found[number])

    def _is_written(self, number: int, replica: nn.Module, was: list) -> bool:
        """Whether a replica is another than it was, as far as can be seen."""
        if self._containers[number] or self._attributes[number]:
            return True
        own = _look(replica)
        return len(own) != len(was) or not all(map(is_, own, was))

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
        before = self._before or [module.__dict__ for module in self.modules]
        stays = self._stays and self.are_kept
        if stays:
            self._before = before
        try:
            _give(self.modules, (replica.__dict__ for replica in replicas))
            criterion = self._criterion
            if self._moves_criterion:
                criterion = Move(self, replicas, tensors)(criterion)
            yield functools.partial(self._run, replicas, tensors), criterion
            self.assigned(replicas, buffers)
        finally:
            if not stays:
                _give(self.modules, before)
            if keep:
                self._as_it_was = False
                for own, replica, attributes in zip(before, replicas, self._attributes):
                    moved = OF_ALL_MODULES.union(["_original"], (key for key, _ in attributes))
                    own.update((key, value) for key, value in replica.__dict__.items() if key not in moved)

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Within it the modules themselves hold what a forward pass has given them beyond its end, where replicas are
        kept.
        """
        self._stays = True
        try:
            yield
        finally:
            before, self._before, self._stays = self._before, None, False
            if before is not None:
                _give(self.modules, before)

    def assigned(self, replicas: list[nn.Module], buffers: MutableMapping[str, Tensor]) -> None:
        """Have `buffers` hold those that a forward pass has assigned."""
        for replica, (_, slots) in zip(replicas, self._slots):
            for key, name, _ in slots:
                held = replica._buffers.get(key)
                if name is not None and held is not None and held is not buffers.get(name):
                    buffers[name] = held.detach()

    @property
    def have_buffers(self) -> bool:
        """Whether a forward pass may assign a buffer, one that is None yet among them."""
        return any(buffers for _, buffers in self._slots)

    @property
    def are_kept(self) -> bool:
        """Whether replicas are taken again, see `keep`."""
        return self._looked_at is not None

    def duplicate(self, parameters: Mapping[str, Tensor] | None = None) -> nn.Module:
        """An independent copy of the module, which keeps neither what a tensor of it was computed from, as
        `torch.nn.utils.weight_norm` does, nor functions that know the module itself.

        parameters: tensors that nobody else holds, which the parameters of these names become without a copy.
        """
        memo: dict[int, Any] = {}
        for name, value in (parameters or {}).items():
            own = self.parameters[name]
            same = (own.shape, own.stride(), own.dtype) == (value.shape, value.stride(), value.dtype)
            if same and type(own) is nn.Parameter and not same_memory(value, own):
                memo[id(own)] = nn.Parameter(value, own.requires_grad)
        for module in self.modules:
            for value in vars(module).values():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    memo[id(value)] = value.detach().clone()
        try:
            copied = deepcopied(self.modules[0], memo)
        except (TypeError, RuntimeError) as error:
            raise InputError(f"the module cannot be copied: {in_one_line(error)}") from error
        if self._as_it_was and not any(self._attributes):
            return copied
        modules = list(copied.modules())
        tensors = dict(chain(copied.named_parameters(), copied.named_buffers()))
        for module in modules:
            own = vars(module)
            for key, value in _not_plain(own):
                if self.refers(value):
                    own[key] = Move(self, modules, tensors)(value)
        return copied

    def _run(self, replicas, tensors, *args, **kwargs):
        if self._watched:
            replaced = self._replaced(tensors)
            with calls_refused(self.own), ReadsRefused(replaced):
                found = replicas[0](*args, **kwargs)
            self._watched = not replaced  # once is enough, and takes a part of the time of a small module
        else:
            found = replicas[0](*args, **kwargs)
        if self._may_make:
            self._may_make = False
            for keys, replica, scripted in zip(self._keys, replicas, self._scripted):
                made = set() if scripted else {*replica._modules, *replica._parameters} - keys
                if made:
                    raise InputError(
                        f"forward makes {min(made)!r}, a layer or a parameter, where there was none, so it would be "
                        "made anew in each step and never learn: run the module once on a batch before"
                    )
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


def _not_plain(attributes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The attributes of a module that modules do not have by themselves and that are more than numbers and texts."""
    return [
        (key, value) for key, value in attributes.items() if key not in OF_ALL_MODULES and not is_plain(value)
    ]


def _give(modules: Iterable[nn.Module], attributes: Iterable[dict[str, Any]]) -> None:
    """Have modules hold these, each its own."""
    for module, own in zip(modules, attributes):
        object.__setattr__(module, "__dict__", own)


def _look(module: nn.Module) -> list:
    """What a module holds, and what the dicts of its parameters, buffers and submodules do."""
    own = module.__dict__
    parts = own, own["_parameters"], own["_buffers"], own["_modules"]
    return [each for part in parts for each in chain(part, part.values())]


def original(module: Module) -> Module:
    """The module that this is a replica of, or itself."""
    return vars(module).get("_original", module)
