"""The notebooks run as plain programs, and those that Jupyter opens are made of these."""

import json
import re
import runpy
import shutil

import pytest

from pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["mnist", "own_pictures"]


def ran(name, tmp_path, monkeypatch, capsys):
    """What a notebook prints, in an empty folder, and its variables."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    try:
        found = runpy.run_path(str(ROOT / "examples" / "notebooks" / f"{name}.py"), run_name="__main__")
    finally:
        pyplot.close("all")
    return capsys.readouterr().out, found


def test_mnist_learns(tmp_path, monkeypatch, capsys):
    said, found = ran("mnist", tmp_path, monkeypatch, capsys)
    untrained, trained, with_adam = (found[name] for name in ("untrained", "trained", "with_adam"))
    for curve in (trained, with_adam):
        assert curve[0].mean == pytest.approx(20, abs=2)  # labels are shuffled: before a step all is chance
        assert curve[5].mean > untrained[5].mean
    before, after = (int(right) for right in re.findall(r"(\d+) of 50", said))
    assert after > 35 > before
    assert {path.name for path in tmp_path.iterdir()} == {"support.png", "curves.png"}


def test_own_pictures_are_learned_and_saved(tmp_path, monkeypatch, capsys):
    said, found = ran("own_pictures", tmp_path, monkeypatch, capsys)
    assert found["accuracy"] > 0.6  # chance is a third
    assert found["again"].classes == ["orange 4", "purple 3", "teal 6"]
    assert "['README.md', 'model.json', 'weights.safetensors']" in said
    shutil.rmtree(tmp_path / "own_pictures_out")
    assert list(tmp_path.iterdir()) == []


@each_notebook
def test_the_notebook_that_jupyter_opens_is_made_of_the_program(path):
    jupytext = pytest.importorskip("jupytext")
    kept = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    made = jupytext.read(path)
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in kept["cells"]] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ], "make notebooks writes it anew"
    assert all(cell["outputs"] for cell in kept["cells"][-1:])  # it was run
    assert not [
        output
        for cell in kept["cells"]
        for output in cell.get("outputs", ())
        if output["output_type"] == "error"
    ]
