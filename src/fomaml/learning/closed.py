"""Modules whose forward pass finds all that it computes with by `self`, as far as can be read from their code.

What is not known to be so counts as open: a forward pass that calls functions of the user's, reads global variables
other than torch and plain values, or has variables of an enclosing function.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fomaml.learning.moving import PLAIN, is_plain

OURS = ("torch.nn.modules.", "fomaml.models")
KNOWN = ("torch", "math")  # packages whose functions know no module of anybody's
BUILTINS = frozenset({
    "abs", "all", "any", "bool", "dict", "enumerate", "float", "int", "isinstance", "len", "list", "max", "min",
    "range", "reversed", "round", "set", "sorted", "str", "sum", "super", "tuple", "zip",
    "AssertionError", "NotImplementedError", "RuntimeError", "TypeError", "ValueError",
})  # fmt: skip
NOT_RUN = ("__init__", "__dict__", "__weakref__")  # nor plain, in a forward pass
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_torchs(module: nn.Module) -> bool:
    """Whether nothing that runs in a forward pass of the module itself, not of its parts, is the user's."""
    own = vars(module)
    hooked = own.get("_forward_hooks") or own.get("_forward_pre_hooks") or "forward" in own
    return not hooked and type(module).__module__.startswith(OURS)


def is_closed(module: nn.Module) -> bool:
    """Whether a forward pass of the module itself, not of its parts, finds by `self` all that it computes with."""
    if is_torchs(module):
        return True
    own = vars(module)
    if any(own.get(name) for name in HOOKS):
        return False
    kind: Any = type(module)
    read = _global_names(kind)
    if read is None:
        return False
    return all(map(_is_harmless, own.values())) and all(
        _is_known(variables[name]) if name in variables else name in BUILTINS for variables, name in read
    )


@functools.lru_cache(maxsize=1024)
def _global_names(kind: type) -> tuple[tuple[dict[str, Any], str], ...] | None:
    """What the code of a class reads of global variables: where they are, and their names. None where it may reach
    others in another way.
    """
    if type(kind) is not type:
        return None
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    for each in kind.__mro__:
        if each is object or each is nn.Module or each.__module__.startswith(OURS):
            continue
        for name, value in vars(each).items():
            if name in NOT_RUN or name.startswith("__annotat"):
                continue
            for part in _functions(value):
                names = _names(part) if isinstance(part, types.FunctionType) else None
                if names is None:
                    return None
                found |= {(id(part.__globals__), name): (part.__globals__, name) for name in names}
    return tuple(found.values())


def _functions(value: Any) -> Iterator[Any]:
    """The functions that an attribute of a class is made of; itself where it is something else that is not plain."""
    if isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif type(value) is property:
        yield from (each for each in (value.fget, value.fset, value.fdel) if each is not None)
    elif not is_plain(value):
        yield value


def _names(function: types.FunctionType) -> set[str] | None:
    """The global variables that a function reads; None where it may reach others."""
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if {*function.__code__.co_freevars} - {"__class__"} or not all(map(is_plain, defaults)):
        return None
    return _read(function.__code__)


def _read(code: types.CodeType) -> set[str] | None:
    found: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("IMPORT", "STORE_GLOBAL", "DELETE_GLOBAL")):
            return None
        # of two opcodes for global variables, Python 3.12 has more
        if instruction.opname == "LOAD_NAME" or "GLOBAL" in instruction.opname:
            found.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _read(constant)
            if inner is None:
                return None
            found |= inner
    return found


def _is_known(value: Any) -> bool:
    """Whether a global variable is a package, a function or a class that knows no module, or a plain value."""
    if is_plain(value):
        return True
    name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) or ""
    kinds = types.ModuleType | types.FunctionType | types.BuiltinFunctionType | type
    return isinstance(value, kinds) and name.split(".")[0] in KNOWN


def _is_harmless(value: Any) -> bool:
    """Whether an attribute of a module refers to nothing, or to what its replicas are known to follow."""
    kind = type(value)  # of a class of the user's there may be more
    if kind in PLAIN or kind in (Tensor, nn.Parameter) or isinstance(value, nn.Module):
        return True
    if kind in (dict, OrderedDict):
        return all(map(_is_harmless, value)) and all(map(_is_harmless, value.values()))
    return kind in (list, tuple, set, frozenset) and all(map(_is_harmless, value))
