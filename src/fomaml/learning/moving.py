"""What refers to modules and tensors, with others in their place: methods, functions, partials, containers."""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, None, or made of such alone, and never changes."""
    kind = type(value)  # no other: a tuple of a class of the user's may hold more
    return kind in PLAIN or (kind in (tuple, frozenset) and all(map(is_plain, value)))


class Tree(Protocol):
    """index: the number of each module by its id. names: the name of each tensor by its id."""

    index: dict[int, int]
    names: dict[int, str]

    def refers(self, value: Any, /) -> bool: ...


class Move:
    """Gives what refers to the tree of some replicas with other modules and tensors in its place.

    modules: in the order of those of the replicas. tensors: by name.
    """

    def __init__(self, replicas: Tree, modules: list[nn.Module], tensors: Mapping[str, Tensor]):
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


def parts(value: Any) -> list:
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
