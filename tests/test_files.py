"""A reader can take a file in: none has more than 400 lines, and what test files share stands in files of its own."""

import re
from pathlib import Path

import pytest

import fomaml.errors

LINES = 400
TESTS = Path(__file__).parent
ROOT = TESTS.parent
FOLDERS = [Path(fomaml.errors.__file__).parent, TESTS, ROOT / "benchmarks", ROOT / "examples", ROOT / "runs"]
FILES = {  # by the path from the folder that holds src or tests
    path.relative_to(folder.parent).as_posix(): path
    for folder in FOLDERS
    for suffix in ("py", "cpp", "h")
    for path in sorted(folder.rglob(f"*.{suffix}"))
}
TEST_FILES = sorted(name for name, path in FILES.items() if path.name.startswith("test_"))
MODULES = {FILES[name].stem for name in TEST_FILES}


def imported(source: str) -> set[str]:
    """The test files that `source` imports, in code that it hands to another process too."""
    return set(re.findall(r"\b(?:import|from)\s+(?:[\w.]+\.)?(test_\w+)", source)) & MODULES


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_long(name):
    lines = FILES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= LINES


@pytest.mark.parametrize("name", TEST_FILES)
def test_no_test_file_imports_another(name):
    assert imported(FILES[name].read_text(encoding="utf-8")) == set()


def test_no_two_test_files_have_one_name():
    assert len(MODULES) == len(TEST_FILES)


@pytest.mark.parametrize(
    "line",
    ["import {}", "    from {} import digest", "from tests.data import {}", '"import os; import {}; run()"'],
)
def test_the_rule_itself(line):
    assert imported(line.format("test_train")) == {"test_train"}
    assert imported(line.format("train")) == imported(line.format("test_tasks_of_mine")) == set()
