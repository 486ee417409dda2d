"""A package's modules as its attributes: `fomaml.checkpoint` after `import fomaml`, which loads few of them itself."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any


def submodules(
    package: str, late: Mapping[str, tuple[str, str]] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562) whose modules are imported when they are first asked for.

    late: further names, each the module and the name in it that it stands for.
    """
    others = dict(late or {})

    @cache
    def names() -> set[str]:
        found = {module.name for module in pkgutil.iter_modules(sys.modules[package].__path__)}
        return {name for name in found if not name.startswith("_")}

    def find(name: str) -> Any:
        if name in others:
            module, own = others[name]
            return getattr(importlib.import_module(f"{package}.{module}"), own)
        if name not in names():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names(), *others})

    return find, listed
