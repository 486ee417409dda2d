"""The package is read from top to bottom: a file imports only from its own layer or one above it, and in no circle."""

import ast
from pathlib import Path

import pytest

import fomaml.errors

ROOT = Path(fomaml.errors.__file__).parent
# A layer is a folder, or a few files that stand for one step of the way from examples to a result.
LAYERS = [
    {
        "errors",
        "regular",
        "choices",
        "sealed",
        "files",
        "trees",
        "layout",
        "tasks",
        "measures",
        "devices",
        "memory",
        "blocks",
        "threads",
        "metrics",
        "submodules",
    },
    {"data"},
    {"models", "draws", "episodes", "group_episodes", "streams", "backbones"},
    {"learning"},
    {"engines"},
    {
        "ranks",
        "ahead",
        "optimizers",
        "outer",
        "features",
        "scoring",
        "finite",
        "portions",
        "train",
        "evaluate",
        "tuning",
        "baselines",
        "checkpoint",
    },
    {"check", "serve"},
    {"app"},
    {"__init__", "__main__"},
]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
MODULES = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in FILES}


def layer(name: str) -> int | None:
    """The number of the layer of `name`, a file or folder of the package."""
    return next((number for number, names in enumerate(LAYERS) if name in names), None)


def imports(source: str) -> set[str]:
    """The modules of the package that `source` imports anywhere, without the package's name, "" for itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found |= {
                full
                if (full := f"{node.module}.{name.name}").removeprefix("fomaml.") in MODULES
                else node.module
                for name in node.names
            }
    return {name.removeprefix("fomaml").lstrip(".") for name in found if name.partition(".")[0] == "fomaml"}


def misplaced(file: str, source: str) -> set[str]:
    """What `file` imports from a layer below its own, or from no layer; the package itself counts as the last."""
    own = layer(file.partition("/")[0].removesuffix(".py"))
    return {
        name
        for name in imports(source)
        if (used := layer(name.partition(".")[0] or "__init__")) is None or used > own
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of an import circle, in order, or none."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for used in sorted(graph.get(module, ())):
            if found := walk(used, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


@pytest.mark.parametrize("file", FILES)
def test_file_imports_only_its_own_layer_and_those_above(file):
    assert layer(file.partition("/")[0].removesuffix(".py")) is not None, "a file that has no place in LAYERS"
    assert misplaced(file, (ROOT / file).read_text(encoding="utf-8")) == set()


def test_no_import_circle():
    graph = {
        module: imports((ROOT / file).read_text(encoding="utf-8")) - {module}
        for module, file in MODULES.items()
    }
    assert circle(graph) == []


def test_settings_import_no_torch():
    files = ["app/settings.py"]
    for file in files:  # grows with what the files in it import
        source = (ROOT / file).read_text(encoding="utf-8")
        assert "import torch" not in source and "from torch" not in source, file
        files += sorted({MODULES[name] for name in imports(source) if name} - set(files))


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("tasks.py", "from fomaml.errors import InputError", set()),
        ("tasks.py", "def f():\n    import fomaml.data.source", {"data.source"}),
        ("data/source.py", "from fomaml.data.synthetic import Sinusoids", set()),
        ("data/source.py", "from fomaml import episodes, errors", {"episodes"}),
        ("learning/adapt.py", "from fomaml import FOMAML", {""}),
        ("learning/adapt.py", "from fomaml.engines.loop import loop", {"engines.loop"}),
        ("learning/adapt.py", "from fomaml.unknown import x", {"unknown"}),
        ("app/judge.py", "from fomaml.app.report import table", set()),
    ],
)
def test_the_rule_itself(file, source, wrong):
    assert misplaced(file, source) == wrong


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
