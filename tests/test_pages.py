"""Every block of code of every page runs as it stands, in an empty folder: those of a page one after the other."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import fomaml
from few import few_baselines
from fomaml.app import cli
from pages import PAGES, ROOT, blocks, read

# Why a block may stay out, in a comment before it.
EXCUSES = {
    "downloads", "installs", "takes minutes", "takes hours", "needs Omniglot", "needs files of yours",
    "needs images of yours", "needs a run of yours", "starts processes", "needs a GPU",
}  # fmt: skip
# In CONTRIBUTING.md the first line of a block names the file that it goes to: tests/test_docs.py puts it there.
RUN = [page for page in PAGES if page.name != "CONTRIBUTING.md" and any(
    block.language and not block.excuse for block in blocks(page.read_text(encoding="utf-8"))
)]  # fmt: skip
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """An empty folder in which `fomaml` and `python` are those of this test, and nothing is downloaded."""
    scripts, folder = tmp_path / "bin", tmp_path / "empty"
    scripts.mkdir()
    folder.mkdir()
    for name, arguments in (("fomaml", "-m fomaml "), ("python", "")):
        (scripts / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        (scripts / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(scripts), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(Path(fomaml.__file__).parents[1]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)


def commands(code):
    """The arguments of each command, where a block has nothing but `fomaml` in it; else None."""
    lines = [line.partition(" #")[0].strip() for line in code.replace("\\\n", " ").splitlines()]
    alone = all(line.startswith("fomaml ") and not set("|&;<>$`*#") & set(line) for line in lines if line)
    return [shlex.split(line)[1:] for line in lines if line] if alone else None


def in_a_shell(block):
    """What it prints. Commands of `fomaml` alone run in this process: most take less time than to begin another."""
    if (alone := commands(block.code)) is not None:
        with contextlib.redirect_stdout(io.StringIO()) as said, warnings.catch_warnings():
            warnings.simplefilter("default")
            for arguments in alone:
                cli.main(arguments)
        return said.getvalue()
    done = subprocess.run(["sh", "-eu", "-c", block.code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done.stdout


def ran(page):
    """What each block of a page prints, by its line, and the variables of the page's Python at the end."""
    namespace, printed = {"__name__": "__main__"}, {}
    for block in blocks(read(page)):
        if block.excuse:
            continue
        if block.language == "sh":
            printed[block.line] = in_a_shell(block)
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as said:
                code = "\n" * block.line + block.code  # a traceback then has the lines of the page
                exec(compile(code, str(ROOT / page), "exec", dont_inherit=True), namespace)
            printed[block.line] = said.getvalue()
    return printed, namespace


@pytest.mark.parametrize(
    "page", [page for page in RUN if page.name != "README.md"], ids=lambda page: page.name
)
def test_a_page_runs(page, shell, monkeypatch):
    few_baselines(monkeypatch)  # of the commands that run in this process
    printed, _ = ran(page.relative_to(ROOT))
    assert printed


def test_the_readme_runs_and_prints_what_it_shows(shell):
    printed, namespace = ran("README.md")
    [shown] = blocks(read("README.md"), "")
    [program] = blocks(read("README.md"), "python")
    for expected, found in zip(shown.code.splitlines(), printed[program.line].splitlines(), strict=True):
        assert re.sub(r"[\d.]+ ±.*", "", expected) == re.sub(r"[\d.]+ ±.*", "", found)
        accuracy, interval = map(float, re.findall(r"[\d.]+", expected)[1:])
        assert float(re.findall(r"[\d.]+", found)[1]) == pytest.approx(accuracy, abs=2 * interval + 0.1)
    adapted, task = namespace["adapted"], namespace["new_tasks"][0]
    assert adapted(task.query.inputs).argmax(1).shape == task.query.targets.shape


@pytest.mark.long  # the page runs in `test_a_page_runs` as well, but for the figures
def test_the_two_loops_print_what_their_page_shows(shell):
    [shown] = blocks(read("docs/two-loops.md"), "")
    command = [sys.executable, str(ROOT / "examples" / "two_loops.py")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.sub(r"\d", "", found) == re.sub(r"\d", "", shown.code)
    numbers = [
        [float(number) for number in re.findall(r"[\d.]+$", text, re.MULTILINE)]
        for text in (found, shown.code)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.01)


@each_page
def test_every_block_runs_or_says_why_not(page):
    text = page.read_text(encoding="utf-8")
    found = blocks(text)
    assert text.count("\n```") == 2 * len(found)
    assert text.count("<!-- not run:") == sum(1 for block in found if block.excuse)
    for block in found:
        where = f"{page.name}, line {block.line}"
        assert block.language in ("python", "sh", ""), where
        assert set(filter(None, block.excuse.split(", "))) <= EXCUSES, where
        assert block.language == "sh" or not block.excuse, where
        if block.language == "":
            assert page.name in ("README.md", "two-loops.md"), f"{where}: no test knows what prints this"


@each_page
def test_no_code_hides_in_an_indented_block(page):
    """Which has no language, and no test."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(text):
        text = text.replace(block.code, "")
    for before, line in zip(text.splitlines(), text.splitlines()[1:]):
        assert not (before == "" and line.startswith("    ")), line


def test_commands_that_run_in_this_process():
    assert commands("fomaml a --b 'c d' \\\n  e  # f\n\nfomaml g\n") == [["a", "--b", "c d", "e"], ["g"]]
    for code in (
        "fomaml a | less\n",
        "cat > a <<'END'\nit's\nEND\nfomaml a\n",
        "fomaml a > b\n",
        "fomaml $A\n",
    ):
        assert commands(code) is None


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n<!-- not run: downloads, takes hours -->\n```sh\ncd\n\nls\n```\n```\nb\n```\n"
    assert blocks(text) == [
        (2, "python", "x = 1\n", ""), (6, "sh", "cd\n\nls\n", "downloads, takes hours"), (11, "", "b\n", ""),
    ]  # fmt: skip
    assert [block.line for block in blocks(text, "sh")] == [6]
