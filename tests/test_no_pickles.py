"""No source file reads or writes pickles, which may run code; a message may speak of them."""

import ast
from pathlib import Path

import pytest

import fomaml.errors

LIBRARIES = {"pickle", "joblib", "dill", "cloudpickle"}


def pickles(source):
    """What a source file does that reads or writes pickles, by its lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if {name.partition(".")[0] for name in names} & LIBRARIES:
                yield node.lineno
        elif isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
            if isinstance(node.value, ast.Name) and node.value.id == "torch":
                yield node.lineno
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            if not refused:
                yield node.value.lineno


def test_no_source_file_reads_pickles():
    root = Path(fomaml.errors.__file__).parent
    found = {file.name: [*pickles(file.read_text(encoding="utf-8"))] for file in root.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "x = torch.load(p)",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=x)",
        "a = torch.save",
        "import a, dill.b",
    ],
)
def test_what_reads_pickles(source):
    assert [*pickles(source)] == [1]
    assert not [*pickles(f"text = {source!r}")]


def test_to_allow_none_is_no_pickle():
    assert not [*pickles("np.load(p, allow_pickle=False)")]
