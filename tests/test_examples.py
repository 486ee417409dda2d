"""Every example is short, and runs."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short_and_runs(path, capsys, tmp_path, monkeypatch):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(path), run_name="__main__")
    assert found["__doc__"]
    assert capsys.readouterr().out


def test_the_loop_of_the_copy_never_moves_the_meta_parameters_and_first_order_maml_does(capsys):
    runpy.run_path(str(EXAMPLES[0].parent / "two_loops.py"), run_name="__main__")
    copied, correct = (line.rpartition(" ")[2] for line in capsys.readouterr().out.splitlines())
    assert copied == "0.0000" and float(correct) > 0.1
