"""Names as the pages write them: after a plain `import fomaml` each is there, and the import itself loads little."""

import ast
import collections
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fomaml

ROOT = Path(fomaml.__file__).parent
REPOSITORY = ROOT.parent.parent
PAGES = [
    REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md",
    *(path for path in sorted(REPOSITORY.glob("docs/*.md")) if path.name != "LOG.md"),
]  # fmt: skip
PROGRAMS = [*sorted((REPOSITORY / "examples").glob("*.py")), *sorted(ROOT.rglob("*.py"))]
NAME = re.compile(r"(?<![\w./-])fomaml(?:\.[A-Za-z]\w*)+(?![\w/])")


def docstrings(source):
    """All that a file says in its docstrings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n".join(ast.get_docstring(n) or "" for n in ast.walk(ast.parse(source)) if isinstance(n, kinds))


def written():
    """The dotted names of the pages and docstrings."""
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    texts += [docstrings(path.read_text(encoding="utf-8")) for path in PROGRAMS]
    return sorted({name for text in texts for name in NAME.findall(text)})


def modules():
    """The modules of the package, by the names that they are imported by."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not any(part.startswith("_") for part in parts):
            yield "fomaml." + ".".join(parts)


# Each name is looked up in a process in which nothing of the package has been imported but itself, and what else is
# looked up in the same module and is no module. Other libraries are imported before, once for all.
LOOK_UP = """
import contextlib, importlib, os, sys
for library in ("torch._dynamo", "torch._inductor.compile_fx", "rich.progress", "sklearn.base", "pandas", "PIL.Image"):
    with contextlib.suppress(ImportError):
        importlib.import_module(library)
import fomaml
for names in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    try:
        for name in names.split():
            found = fomaml
            try:
                for part in name.split(".")[1:]:
                    found = getattr(found, part)
            except AttributeError as error:
                print(f"{name}: {error}")
    finally:
        sys.stdout.flush()
        os._exit(0)
"""


def alone(code, *arguments):
    # newer Pythons warn of forks beside other threads, which are those of numpy
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *arguments]
    environment = {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


NOWHERE = ["nothing", "data.nothing", "learning.nothing", "__wrapped__", "__main__", "engines.__nothing__"]


@functools.cache
def missing():
    """What is said of each name of which anything is, of all that are looked up in this file."""
    names = {*written(), *modules(), *(f"fomaml.{name}" for name in [*fomaml.LATE, *NOWHERE])}
    every, together = {*modules()}, collections.defaultdict(list)
    for name in sorted(names):
        together[name if name in every else name.rpartition(".")[0] + "."].append(name)
    return dict(line.split(": ", 1) for line in alone(LOOK_UP, *map(" ".join, together.values())))


def test_names_are_found_as_written():
    assert {"fomaml.checkpoint.save_weights", "fomaml.FOMAML", "fomaml.data.folder.load_folder"} <= {
        *written()
    }
    assert not {*written()} & {*missing()}


def test_every_module_is_an_attribute():
    """But two whose names are functions: those that the package offers."""
    assert not {*modules()} & {*missing()}
    assert callable(fomaml.train) and callable(fomaml.evaluate)


def test_functions_of_the_application_are_imported_when_they_are_asked_for():
    assert not {f"fomaml.{name}" for name in fomaml.LATE} & {*missing()}
    assert {*fomaml.LATE} <= {*dir(fomaml)}


def test_no_other_name_is():
    for name in NOWHERE:
        said = missing()[f"fomaml.{name}"]
        assert said.startswith("module 'fomaml") and said.endswith(f"no attribute {name.split('.')[-1]!r}")


def test_the_names_of_a_package_are_listed():
    assert {"checkpoint", "data", "FOMAML", "train"} <= {*dir(fomaml)}
    assert {"folder", "mnist", "source"} <= {*dir(fomaml.data)}
    assert not {"_torch", "__main__"} & {*dir(fomaml.app), *dir(fomaml.check)}


HEAVY = ("PIL", "torchvision", "mlxtend", "rich", "safetensors", "torch._dynamo", "torch._inductor", "fomaml.app",
         "fomaml.engines.compiled", "fomaml.engines.cpu", "fomaml.data.folder", "fomaml.check")  # fmt: skip


def test_the_import_loads_little():
    loaded = alone(
        "import sys, torch\nbefore = {*sys.modules}\nimport fomaml\nprint(*{*sys.modules} - before, sep='\\n')"
    )
    assert "fomaml.train" in loaded
    assert not [name for name in loaded if name.startswith(HEAVY)]


def test_a_checker_of_types_is_told_of_every_module():
    """Those that no function of the same name hides, and of the functions that are imported when they are asked for."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    [told] = [node for node in tree.body if isinstance(node, ast.If)]
    names = {alias.name for line in told.body for alias in line.names}
    assert names == {name.split(".")[1] for name in modules()} - {"train", "evaluate", "submodules"} | {
        *fomaml.LATE
    }


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("`fomaml.data.folder` and fomaml.FOMAML(", ["fomaml.data.folder", "fomaml.FOMAML"]),
        ("src/fomaml.md, a.fomaml.b, fomaml train", []),
        ("fomaml.train. Then", ["fomaml.train"]),
    ],
)
def test_what_is_a_name(text, names):
    assert NAME.findall(text) == names


SCRIPTS = [*sorted((REPOSITORY / "runs").glob("*.py")), *sorted((REPOSITORY / "benchmarks").glob("*.py"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_a_script_imports_of_the_package_is_there(path):
    """Scripts take hours, so no test runs them; a name that has moved would be found by who does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fomaml":
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"line {node.lineno}: {node.module} has no {name.name}"
