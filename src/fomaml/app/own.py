"""Code of the user's own: imported where the user names it, and told apart by digests of its files."""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import operator
import random
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fomaml import regular
from fomaml.devices import forked_random
from fomaml.errors import InputError, in_one_line

INSTALLED = {"site-packages", "dist-packages"}
_FIRST: dict[Path, str] = {}  # the digests of neighbours when this process first saw them


@dataclass(frozen=True)
class Own:
    """Something that the user has named.

    name: FILE.py:NAME or package.module:NAME. value: what has that name. path: the file that it stands in.
    sha256: of that file. beside: of the files that it imports from its own folder, by their path in there.
    """

    name: str
    value: Any
    path: Path
    sha256: str
    beside: dict[str, str]

    @property
    def record(self) -> dict[str, Any]:
        """What config.json keeps of it."""
        return {"name": self.name, "sha256": self.sha256, "beside": self.beside}

    def __reduce__(self):
        """A process of its own imports it by its name, as functions of a file cannot be pickled."""
        return again, (self.name, self.record)


def again(name: str, record: dict[str, Any]) -> Own:
    """`find`, of what has been found before.

    Raises:
        InputError: it is another by now.
    """
    found = find(name)
    if changes := changed(record, found):
        raise InputError(f"{changes} since it was first read; begin anew")
    return found


def is_own(name: str) -> bool:
    """Whether a name is of the user's own code: it names a file, or something in a module."""
    return name.endswith(".py") or ":" in name


def split(name: str) -> tuple[str, str]:
    """FILE.py or package.module, and NAME, "" where there is none."""
    found = re.fullmatch(r"(.*\.py)(?::(.*))?", name)
    if found:
        return found[1], found[2] or ""
    source, _, attribute = name.partition(":")
    return source, attribute


def find(name: str, candidates: Callable[[ModuleType], list[str]] | None = None) -> Own:
    """Import what `package.module:NAME`, `FILE.py:NAME`, or either without NAME, names.

    The current directory and that of the file are importable. What is imported draws from random numbers of a fixed
    seed, and what it prints goes to standard error.

    candidates: a module → the names in it that may be meant: the only one without NAME, or what there is in its place.

    Raises:
        InputError: no such thing, or its import raises an error or changes how torch computes.
    """
    source, attribute = split(name)
    namespace, path, sha256 = _import(source)
    listed = candidates or _defined
    if not attribute:
        names = listed(namespace)
        if len(names) != 1:
            there = ", ".join(names) or "none that needs no arguments"
            raise InputError(f"which one of {source}? Name one, {source}:NAME; there are: {there}")
        [attribute] = names
    try:
        value = operator.attrgetter(attribute)(namespace)
    except AttributeError:
        names = _defined(namespace)
        near = difflib.get_close_matches(attribute, names, len(names), 0)
        told = f"the nearest names: {', '.join(near)}" if near else "it defines nothing"
        raise InputError(f"{source} has no {attribute!r}; {told}") from None
    return Own(f"{source}:{attribute}", value, path, sha256, _beside(path))


def of_object(value: Any) -> Own:
    """What the digests of an object's own file are, of a class, function or instance that is there already.

    Raises:
        InputError: it stands in no file, as in a notebook.
    """
    kind = value if inspect.isclass(value) or inspect.isroutine(value) else type(value)
    try:
        path = Path(inspect.getsourcefile(kind) or "").resolve(strict=True)
        data = regular.read_bytes(path)
    except (TypeError, OSError):
        raise InputError(
            f"{getattr(kind, '__name__', kind)} stands in no file that could be compared with that of the run; "
            "move it to one, or accept changed code"
        ) from None
    return Own(f"{path.name}:{kind.__qualname__}", value, path, _sha256(data), _beside(path))


def changed(record: dict[str, Any], found: Own) -> str:
    """Which file is not what a record says, in words; "" where none has changed."""
    if record["sha256"] != found.sha256:
        then, now = record["sha256"][:12], found.sha256[:12]
        return f"{found.path.name} has changed (SHA-256 {then}… then, {now}… now)"
    names = record["beside"].keys() | found.beside.keys()
    others = sorted(name for name in names if record["beside"].get(name) != found.beside.get(name))
    return f"{', '.join(others)}, which {found.path.name} imports, changed" if others else ""


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within: the random numbers of torch, numpy and Python follow from the seed; after it they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with forked_random():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def told(what: str, path: Path | None, seed: int = 0) -> Iterator[None]:
    """Within: code of the user's own runs, see `seeded`; what it prints goes to standard error.

    what: what goes wrong where it raises an error, in words.

    Raises:
        InputError: it raises an error, which is told in one line with the line of the file; or it changes how torch
            computes from here on.
    """
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        with contextlib.redirect_stdout(sys.stderr), seeded(seed):
            yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what}: {in_one_line(error)}{where(error, path)}") from None
    finally:
        now = torch.get_default_dtype(), torch.is_grad_enabled()
        torch.set_default_dtype(before[0])
        torch.set_grad_enabled(before[1])
    if now != before:
        change = f"the default dtype to {now[0]}" if now[0] != before[0] else "gradients on or off"
        raise InputError(
            f"{path.name if path else what} sets {change} for all of torch; set it in the module alone"
        )


def where(error: BaseException, path: Path | None) -> str:
    """The line of the user's file that an error came from: " (net.py, line 3)", or of one beside it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    if path is None:
        return ""
    folder = path.resolve().parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_beside(Path(frame.filename), folder) or Path(frame.filename).resolve() == path.resolve():
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def _import(source: str) -> tuple[ModuleType, Path, str]:
    """The namespace, its file and the digest of what was read from there."""
    path = Path(source)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob("*.py")], 3, 0.5)
        raise InputError(f"there is no file {source}" + (f"; there are {', '.join(near)}" if near else ""))
    folders = [*([str(path.resolve().parent)] if is_file else []), str(Path.cwd())]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    what = f"{source} could not be imported"
    if is_file:
        return _run(path, what)
    with told(what, Path.cwd() / "_"):
        namespace = importlib.import_module(source)
    file = getattr(namespace, "__file__", None)
    if file is None:
        raise InputError(f"{source} stands in no file of its own; name a module that does")
    path = Path(file).resolve()
    return namespace, path, _seen(path, regular.read_bytes(path, regular.LOG))  # it may be a compiled one


def _run(path: Path, what: str) -> tuple[ModuleType, Path, str]:
    """Run a file as a module. It is read once, so that the digest is of what ran."""
    data = regular.read_bytes(path)
    sha256 = _sha256(data)
    name = f"_own_{path.stem}_{_sha256(f'{path.resolve()} {sha256}'.encode())[:12]}"
    if name in sys.modules:  # a loss may stand beside the model that it knows
        return sys.modules[name], path.resolve(), sha256
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # of a .py file that is there
    namespace = importlib.util.module_from_spec(spec)
    sys.modules[name] = namespace
    try:
        with told(what, path):
            exec(compile(data, str(path), "exec", dont_inherit=True), vars(namespace))
    except BaseException:
        del sys.modules[name]
        raise
    return namespace, path.resolve(), sha256


def _beside(path: Path) -> dict[str, str]:
    """The digests of the files below the folder of `path` that it imports, directly or by another of them.

    Of an installed package that is nothing: its version says what it is.
    """
    path = path.resolve()
    if INSTALLED & set(path.parts):
        return {}
    found: dict[Path, str] = {}
    waiting = [(path, _package(path))]
    while waiting:
        file, package = waiting.pop()
        data = regular.read_bytes(file)
        found[file] = _sha256(data) if file == path else _seen(file, data)
        for name in _imported(data, package):
            module = sys.modules.get(name)
            other = Path(getattr(module, "__file__", None) or "").resolve()
            if other not in found and other.suffix == ".py" and _is_beside(other, path.parent):
                waiting.append((other, getattr(module, "__package__", None) or ""))
    return {str(file.relative_to(path.parent)): sha for file, sha in sorted(found.items()) if file != path}


def _package(path: Path) -> str:
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file) == path:
            return getattr(module, "__package__", None) or ""
    return ""


def _imported(data: bytes, package: str) -> Iterator[str]:
    """The full names of all modules that a source may import; some are names of other things."""
    for node in ast.walk(ast.parse(data)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield from (".".join(parts[: n + 1]) for n in range(len(parts)))
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            with contextlib.suppress(ImportError):  # relative, outside of a package
                full = importlib.util.resolve_name(name, package) if node.level else name
                yield full
                yield from (f"{full}.{alias.name}" for alias in node.names)


def _is_beside(file: Path, folder: Path) -> bool:
    """Whether a file is below the folder, but in no environment that lies there too."""
    file = file.resolve()
    if not file.is_relative_to(folder) or INSTALLED & set(file.relative_to(folder).parts):
        return False
    return not file.is_relative_to(Path(sysconfig.get_paths()["stdlib"]).resolve())


def _seen(path: Path, data: bytes) -> str:
    """The digest of a file that Python has imported, which it does once in a process.

    Raises:
        InputError: the file has changed since.
    """
    sha256 = _sha256(data)
    if _FIRST.setdefault(path, sha256) != sha256:
        raise InputError(f"{path} has changed since this process imported it; start Python anew")
    return sha256


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _defined(namespace: ModuleType) -> list[str]:
    """The names of the classes and functions that a module defines, and of the objects that it makes."""
    names = {name: value for name, value in vars(namespace).items() if not name.startswith("_")}
    own = [name for name, value in names.items() if getattr(value, "__module__", "") == namespace.__name__]
    plain = (ModuleType, type, str, bytes, int, float)
    made = [n for n, v in names.items() if not isinstance(v, plain) and not inspect.isroutine(v)]
    return list(dict.fromkeys(own + made))
