"""A package's modules as its attributes: `fomaml.checkpoint` after `import fomaml`, which loads few of them itself."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType


def submodules(package: str) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562) whose modules are imported when they are first asked for."""

    @cache
    def names() -> set[str]:
        found = {module.name for module in pkgutil.iter_modules(sys.modules[package].__path__)}
        return {name for name in found if not name.startswith("_")}

    def find(name: str) -> ModuleType:
        if name not in names():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names()})

    return find, listed
