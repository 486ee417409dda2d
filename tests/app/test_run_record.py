"""What a run directory tells, and the line that repeats it."""

import dataclasses
import json
import shlex

import numpy as np
import pytest

from fomaml.app.cli import COMMANDS, main
from fomaml.app.commands import given
from fomaml.app.parser import parse_command
from fomaml.app.run_record import command, read_record
from fomaml.app.settings import from_json, to_json
from fomaml.app.settle import settle
from fomaml.app.show_run import chart, show_run

OF_RUN = {"out", "facts", "image"}  # what is filled in when a run begins, or is a new run's own
QUICK = "sinusoid --iterations 3 --test-tasks 3 --test-steps 0 1 --no-baselines"
ASKED = {
    "defaults": "sinusoid",
    "algorithm": "sinusoid --algorithm maml --shots 5 --iterations 77 --test-steps 0 3 --no-baselines",
    "seconds": "sinusoid --seconds 3 --seed 4",
    "preset": "--preset fomaml-omniglot-5w1s --iterations 500 --data-root some/folder",
    "question": "mnist --question new-digits --shots 5 --query-shots 7",
    "heads": "omniglot --algorithm proto-maml --ways 5 --train-ways 10 --inner-lr 0.05",
    "folder": "folder:PATH --ways 3 --rgb --image-size 16 20 --skip-small-classes --shares 0.5 0.2 0.3",
    "rows": "table:ROWS --task machine --target wear --features level --query-all --inner-optimizer adam --no-scale",
    "states": "table:ROWS --task machine --target state --features wear --shots 1 --query-shots 2 --separator ,",
    "all classes, drawn": "table:ROWS --task machine --target state --features wear --ways 2 --query-shots 2",
    "kind": "table:ROWS --task machine --target level --kind regression --features wear",
}


@pytest.mark.parametrize("name", ASKED)
def test_the_line_makes_the_same_settings(name, tmp_path):
    pd = pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
    pd.DataFrame({
        "machine": np.repeat(["a", "b", "c"], 10), "wear": np.arange(30.0),
        "state": ["good", "bad"] * 15, "level": [1, 2, 3] * 10,
    }).to_csv(tmp_path / "my rows.csv", index=False)  # fmt: skip
    words = ASKED[name].replace("PATH", "my/photos").split()
    words = [word.replace("ROWS", str(tmp_path / "my rows.csv")) for word in words]
    kinds = {key: own.options for key, own in COMMANDS.items()}
    settings = settle(**given(parse_command(kinds, ["train", *words], "fomaml", "")))
    # as a run keeps them
    kept = from_json(to_json(settings), "config.json")
    line = shlex.split(command(kept))
    assert line[:2] == ["fomaml", "train"]
    again = settle(**given(parse_command(kinds, line[1:], "fomaml", "")))
    for field in dataclasses.fields(settings):
        if field.name not in OF_RUN:
            assert getattr(again, field.name) == getattr(settings, field.name), (field.name, line)
    assert len(line) <= len(words) + 2 + 2  # no option is named that needs no naming, but for one


def test_code_of_ones_own_is_named_and_not_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n"
        "    def __init__(self, width=3, outputs=1):\n"
        "        super().__init__(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, outputs))\n"
    )
    asked = "--model mine.py:Net --model-options width=7 --iterations 2 --test-tasks 2 --test-steps 0 1 --no-baselines"
    main(["train", "sinusoid", *asked.split(), "--out", "run"])
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
    line = command(read_record(tmp_path / "run").settings)
    assert all(
        words in line for words in ("--model mine.py:Net", "--model-options width=7", "--iterations 2")
    )


def test_measurements_are_read_up_to_the_line_that_is_being_written(tmp_path):
    (tmp_path / "config.json").write_text(to_json(settle(source="sinusoid")))
    lines = [
        {"iteration": 10, "meta_loss": 2.0, "before": 3.0, "after": 1.0, "seconds": 0.1},
        {"iteration": 20, "meta_loss": float("nan"), "before": 2.0, "after": 0.5, "seconds": 0.2},
        {"iteration": 20, "validation": 0.75, "interval": 0.1, "seconds": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"itera')
    assert read_record(tmp_path).curves() == {
        "meta-loss": [(10, 2.0)],  # what is no number is in no curve
        "before adaptation": [(10, 3.0), (20, 2.0)],
        "after adaptation": [(10, 1.0), (20, 0.5)],
        "validation": [(20, 0.75)],
    }
    told = show_run(tmp_path)
    assert "after adaptation, loss: 1 → 0.5" in told and "no result yet: 20 of 15000 iterations" in told


def test_a_chart_goes_from_the_least_to_the_greatest():
    found = chart("loss", [(0, 4.0), (1, 4.0), (2, 1.0)], "mse").splitlines()
    assert found[0] == "loss, mse: 4 → 1"
    assert found[1] == "4 ┤██" and found[-2] == "1 ┤██▁" and len(found) == 10
    assert found[-1].split() == ["0", "2"]
    assert chart("flat", [(5, 1.0)]).splitlines()[0] == "flat: 1 → 1"


def trained(out):
    """The directory of a short run of functions."""
    options = "--iterations 3 --test-tasks 3 --test-steps 0 1 --no-baselines --out"
    main(["train", "sinusoid", *options.split(), str(out)])
    return out


def test_show_prints_the_result(tmp_path, capsys):
    out = trained(tmp_path / "run")
    capsys.readouterr()
    main(["show", str(out)])
    told = capsys.readouterr().out
    assert (out / "result.txt").read_text().strip() in told and "meta-loss: " in told


def test_show_draws_the_curves(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib, of the extra plots")
    out = trained(tmp_path / "run")
    capsys.readouterr()
    main(["show", str(out), "--png", str(tmp_path / "plots")])
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"training.png", "training.svg", "steps.png", "steps.svg"}
    assert capsys.readouterr().out.count("saved ") == 4
