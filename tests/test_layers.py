"""The folder is a pipeline: a file imports only files that stand above it in ORDER."""

import ast
from pathlib import Path

import pytest

import fomaml.errors

ROOT = Path(fomaml.errors.__file__).parent
ORDER = [
    *(
        "errors",
        "tasks",
        "data",
        "episodes",
        "models",
        "rates",
        "moments",
        "adapt",
        "heads",
        "objectives",
        "learner",
        "algorithms",
        "engines",
        "train",
    ),
    *(
        "evaluate",
        "load",
        "check",
        "checkpoint",
        "report",
        "presets",
        "recipes",
        "config",
        "resolve",
        "commands",
        "build",
        "validate",
        "judge",
        "run",
        "compare",
        "cli",
        "__init__",
    ),
]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def layer(module: str) -> str:
    """The entry of ORDER that `fomaml.<layer>...` names; the package itself is `__init__`."""
    return [*module.split("."), "__init__"][1]


def imports(source: str) -> set[str]:
    """Every module that `source` imports anywhere; `from fomaml import x` counts as fomaml.x."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            inner = {f"fomaml.{n.name}" if n.name in ORDER else "fomaml" for n in node.names}
            found |= inner if node.module == "fomaml" else {node.module}
    return found


def misplaced(file: str, source: str) -> set[str]:
    """The layers that `file` must not import, but does."""
    own = file.partition("/")[0].removesuffix(".py")
    allowed = set(ORDER[: ORDER.index(own)]) | ({own} if "/" in file else set())
    if file == "__init__.py":
        allowed.remove("cli")
    used = {layer(name) for name in imports(source) if name.partition(".")[0] == "fomaml"}
    return used - allowed


@pytest.mark.parametrize("file", FILES)
def test_file_imports_only_what_stands_above_it(file):
    assert file.partition("/")[0].removesuffix(".py") in ORDER, "a file that has no place in ORDER"
    assert misplaced(file, (ROOT / file).read_text(encoding="utf-8")) == set()


def test_config_imports_no_torch():
    files = ["config.py"] if "config.py" in FILES else []
    for file in files:  # grows with what the files in it import
        names = imports((ROOT / file).read_text(encoding="utf-8"))
        assert "torch" not in {name.partition(".")[0] for name in names}, file
        inner = {name.removeprefix("fomaml.").replace(".", "/") + ".py" for name in names}
        files += sorted(inner & set(FILES) - set(files))


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("tasks.py", "from fomaml.errors import InputError", set()),
        ("tasks.py", "def f():\n    import fomaml.data.source", {"data"}),
        ("data/source.py", "from fomaml.data.synthetic import Sinusoids", set()),
        ("data/source.py", "from fomaml import episodes, errors", {"episodes"}),
        ("adapt.py", "from fomaml import FOMAML", {"__init__"}),
        ("adapt.py", "from fomaml.engines.loop import loop", {"engines"}),
        ("adapt.py", "from fomaml.unknown import x", {"unknown"}),
        ("__init__.py", "from fomaml.train import train\nfrom fomaml.cli import main", {"cli"}),
    ],
)
def test_the_rule_itself(file, source, wrong):
    assert misplaced(file, source) == wrong
