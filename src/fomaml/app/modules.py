"""A module of the user's own, by the name of its Python module or file."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import operator
import sys
from pathlib import Path

import torch
from torch import nn

from fomaml.errors import InputError, in_one_line


def load_module(name: str, seed: int = 0) -> nn.Module:
    """Build the module that `package.module:factory`, `file.py:factory`, or either without a factory, names.

    The factory is a class, a function or a module. Without one it is the only `nn.Module` subclass that
    needs no arguments, or else the only function that needs none, or module. The current directory and
    that of the file are importable.

    Raises:
        InputError: no such thing, or it raises an error.
    """
    torch.manual_seed(seed)
    source, _, attribute = name.partition(":")
    namespace = _import(source)
    try:
        factory = operator.attrgetter(attribute or _only(namespace, source))(namespace)
    except AttributeError:
        names = [name for name in vars(namespace) if not name.startswith("__")]
        near = difflib.get_close_matches(attribute, names, 4, 0)
        raise InputError(f"{source} has no {attribute!r}; the nearest names: {', '.join(near)}") from None
    try:
        module = factory if isinstance(factory, nn.Module) else factory()
    except (Exception, SystemExit) as error:
        raise InputError(f"{name} could not be built: {in_one_line(error)}") from None
    if not isinstance(module, nn.Module):
        raise InputError(f"{name} must give an nn.Module, not a {type(module).__name__}")
    return module


def _import(source: str):
    path = Path(source)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise InputError(f"there is no file {source}")
    folders = [str(Path.cwd()), *([str(path.resolve().parent)] if is_file else [])]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    try:
        if not is_file:
            return importlib.import_module(source)
        spec = importlib.util.spec_from_file_location(f"_checked_{path.stem}", path)
        assert spec is not None and spec.loader is not None  # of a .py file that is there
        namespace = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(namespace)
        return namespace
    except (Exception, SystemExit) as error:
        raise InputError(f"{source} could not be imported: {in_one_line(error)}") from None


def _only(namespace, source: str) -> str:
    """The name of the one thing in a file that gives a module without arguments."""
    classes, others = [], []
    for name, value in vars(namespace).items():
        if isinstance(value, nn.Module):
            others.append(name)
        elif getattr(value, "__module__", None) == namespace.__name__ and not name.startswith("_"):
            if inspect.isclass(value) and issubclass(value, nn.Module) and _needs_nothing(value):
                classes.append(name)
            elif inspect.isfunction(value) and name != "main" and _needs_nothing(value):
                others.append(name)
    if len(classes or others) == 1:
        return (classes or others)[0]
    there = ", ".join(classes + others) or "none that needs no arguments"
    raise InputError(f"which module of {source}? Name one, {source}:NAME; there are: {there}")


def _needs_nothing(function) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
