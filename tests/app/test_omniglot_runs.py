"""The scripts behind the Omniglot figures, on a small Omniglot: keep, table, plot, and one command for each preset."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

import characters
from fomaml.app.build import open_data
from fomaml.app.cli import main
from fomaml.app.presets import PRESETS
from fomaml.app.rundir import load_run
from fomaml.errors import InputError
from runs import omniglot_errors, omniglot_keep, omniglot_plot, omniglot_table
from runs.omniglot_table import figure

RUNS = Path(omniglot_keep.__file__).parent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return characters.write(tmp_path_factory.mktemp("omniglot"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    characters.shrink(monkeypatch)


def trained(root, out, preset="fomaml-omniglot-5w1s", *options):
    quick = ["--iterations", "2", "--meta-batch-size", "1", "--test-tasks", "2", "--validation-tasks", "2"]
    steps = ["--channels", "4", "--test-steps", "0", "1", "--no-baselines", "--validate-every", "1"]
    arguments = ["--preset", preset, "--data-root", root, "--out", out, *quick, *steps, *options]
    main(["train", *map(str, arguments)])
    return out


def keep(run, to, **options):
    omniglot_keep.main(omniglot_keep.Options(run, to, tasks=3, **options))
    return to


def test_a_kept_run_is_judged_by_every_protocol_and_works_from_a_fresh_clone(root, tmp_path, capsys):
    run = trained(root, tmp_path / "run", "fomaml-omniglot-5w5s")
    kept = keep(run, tmp_path / "docs" / "results" / "name", seed=4)
    judged = json.loads((kept / "evaluations.json").read_text())
    found = [each["protocol"] for each in judged["evaluations"]]
    assert [each["query_shots"] for each in found] == [5, 1, 15]
    assert {(each["statistics"], each["transductive"]) for each in found} == {("own", True)}
    support = [each["by_statistics"]["support"]["protocol"] for each in judged["evaluations"]]
    assert {(each["statistics"], each["transductive"]) for each in support} == {("support", False)}
    for path in kept.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name  # no path of this machine
    assert sum(path.stat().st_size for path in kept.iterdir()) < 500_000
    for path in run.iterdir():  # only what was kept is left
        path.unlink()
    capsys.readouterr()
    options = [
        "--query-shots",
        "15",
        "--statistics",
        "own",
        "support",
        "--tasks",
        "3",
        "--seed",
        "4",
        "--json",
    ]
    main(["evaluate", str(kept), "--data-root", str(root), *options])
    again = json.loads(capsys.readouterr().out)
    assert again == judged["evaluations"][2]


def test_errors_are_counted_by_the_image_that_was_wrong(root, tmp_path, capsys):
    run = trained(root, tmp_path / "run", "fomaml-omniglot-5w1s", "--test-augment", "none")
    config, learner = load_run(run)
    episodes = open_data(config, 4).test
    found, scores = omniglot_errors.count_errors(learner, episodes, 3, steps=1)
    images = episodes.source.take(torch.arange(len(episodes.source.inputs)))
    expected = Counter()
    for task in map(episodes.__getitem__, range(3)):
        wrong = learner.adapt(task.support, steps=1)(task.query.inputs).argmax(1) != task.query.targets
        for image in task.query.inputs[wrong]:
            [row] = [row for row, each in enumerate(images) if torch.equal(each, image)]
            expected[row] += 1
    assert found == expected and found.total() == round(5 * (1 - scores).sum().item()) > 0
    capsys.readouterr()
    plot = tmp_path / "errors.png"
    pytest.importorskip("matplotlib")
    omniglot_errors.main(omniglot_errors.Options(run, tasks=3, seed=4, worst=2, plot=plot))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("5-way 1-shot, 1 query images a class, 3 tasks: ")
    assert len(said) == 5 and said[-1] == f"saved {plot}" and plot.stat().st_size > 1000
    (row, number), *_ = found.most_common(1)
    name, place = omniglot_errors.where(episodes.source, row)
    assert said[2].split(maxsplit=1) == [str(number), f"{name}, image {place}"]


def test_evaluation_takes_protocols_of_its_own(root, tmp_path, capsys):
    run = trained(root, tmp_path / "run")
    capsys.readouterr()
    main(["evaluate", str(run), "--test-augment", "none", "--query-shots", "2", "--statistics", "support"])
    said = capsys.readouterr().out
    assert said.startswith(
        "Omniglot, maml, 5-way 1-shot, 2 unseen tasks, 2 query examples per class, "
        "inductive, statistics of the support set\n"
    )
    main(["evaluate", str(run)])
    text = "2 unseen tasks, 1 query example per class, each class turned at random, transductive\n"
    assert text in capsys.readouterr().out


def test_a_run_whose_head_is_made_of_classes_is_judged_at_other_ways_and_shots(root, tmp_path):
    run = trained(
        root, tmp_path / "run", "best-omniglot", "--ways", "5", "--train-ways", "8", "--jitter", "0.125"
    )
    further = {"copies": 2, "turned": True, "balanced": True}
    folder = keep(run, tmp_path / "results" / "omniglot_best", also=("3w2s",), **further)
    judged = json.loads((folder / "evaluations.json").read_text())["evaluations"]
    tasks = [
        tuple(found["protocol"][k] for k in ("ways", "shots", "query_shots", "copies")) for found in judged
    ]
    assert tasks[:5] == [(5, 1, 1, 1), (5, 1, 15, 1), (5, 1, 1, 2), (5, 1, 1, 1), (5, 1, 1, 1)]
    assert tasks[5:] == [(3, 2, 2, 1), (3, 2, 15, 1), (3, 2, 2, 2), (3, 2, 2, 1), (3, 2, 2, 1)]
    choices = [(found["protocol"]["test_augment"], found["protocol"]["balanced"]) for found in judged]
    assert choices == [*3 * [("none", False)], ("turns", False), ("turns", True)] * 2
    assert judged[2]["protocol"]["jitter"] == 0.125 and [row["steps"] for row in judged[2]["rows"]] == [1]
    rows = omniglot_table.table(tmp_path / "results").splitlines()[2:]
    for row, (plain, many, copied, turned, balanced) in zip(rows, (judged[5:], judged[:5])):
        cells = row.split(" | ")
        assert cells[2:4] == [
            f"{figure(turned)} transductive, 3 tasks",
            figure(turned["by_statistics"]["support"]),
        ]
        assert cells[4].split("; ") == [
            f"not turned, {figure(plain)}, inductive {figure(plain['by_statistics']['support'])}",
            f"not turned, 2 copies: {figure(copied)}, inductive {figure(copied['by_statistics']['support'])}",
            f"balanced: {figure(balanced)}",
        ]
        assert cells[5] == f"not turned, {figure(many)} transductive"
    assert [row.split(", ")[0] for row in rows] == ["| 3-way 2-shot", "| 5-way 1-shot"]


def test_a_head_of_so_many_ways_takes_no_other(root, tmp_path, capsys):
    run = trained(root, tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--ways", "4"])
    assert "learned a head for 5 ways, got --ways 4" in capsys.readouterr().err


def test_the_last_weights_are_kept_where_asked_for(root, tmp_path, capsys):
    run = trained(root, tmp_path / "run")
    (run / "weights.safetensors").write_bytes(b"the best ones, which nobody reads")
    folder = keep(run, tmp_path / "results" / "omniglot_last", weights="last")
    assert (folder / "weights.safetensors").read_bytes() == (run / "last.safetensors").read_bytes()
    assert json.loads((folder / "evaluations.json").read_text())["weights"] == "last"
    [row] = omniglot_table.table(tmp_path / "results").splitlines()[2:]
    assert "| 2 |" in row and "best at" not in row
    capsys.readouterr()
    main(["evaluate", str(run), "--weights", "last", "--json"])
    last = json.loads(capsys.readouterr().out)["accuracy"]
    main(["evaluate", str(folder), "--data-root", str(root), "--json"])
    assert json.loads(capsys.readouterr().out)["accuracy"] == last
    (run / "last.safetensors").unlink()
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--weights", "last"])
    assert "weights.safetensors is damaged" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--weights", "first"])
    assert "unknown weights 'first'; there are: best, last" in capsys.readouterr().err


def test_an_unfinished_run_is_not_kept(root, tmp_path):
    run = trained(root, tmp_path / "run")
    (run / "result.json").unlink()
    with pytest.raises(InputError, match=r"has no result.json: is the run finished\?"):
        keep(run, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_the_table_sets_published_beside_measured(root, tmp_path):
    docs = tmp_path / "docs"
    for name in ("reptile-omniglot-5w1s", "fomaml-omniglot-5w1s"):
        run = trained(root, tmp_path / name, name, "--seed", "3")
        keep(run, docs / "results" / f"omniglot_{name}")
    page = docs / "results.md"
    page.write_text(f"before\n{omniglot_table.BEGIN}\nold\n{omniglot_table.END}\nafter\n")
    omniglot_table.main(docs)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    for line, name in zip(lines[2:], ("fomaml-omniglot-5w1s", "reptile-omniglot-5w1s")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        folder = docs / "results" / f"omniglot_{name}"
        own, many = json.loads((folder / "evaluations.json").read_text())["evaluations"]
        published = own if name.startswith("fomaml") else own["with-query"]
        assert cells[0] == f"5-way 1-shot, [omniglot_{name}](results/omniglot_{name})"
        assert cells[1] == f"{PRESETS[name].aim} (Nichol et al. 2018)"
        assert cells[2].startswith(f"{100 * published['accuracy']:.2f} ± {100 * published['interval']:.2f} ")
        assert PRESETS[name].statistics in cells[2]
        assert cells[4] == "" and cells[5].startswith(f"{100 * many['accuracy']:.2f} ± ")
        assert cells[7] == "3, tasks 1" and cells[8].startswith("2, best at ")
        assert cells[10] == f"`sh runs/omniglot_{name}.sh`"
    omniglot_table.main(docs)
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(InputError, match="needs the marks"):
        omniglot_table.main(docs)


def test_other_shots_stand_beside_the_same_algorithm(root, tmp_path):
    run = trained(root, tmp_path / "run", "fomaml-omniglot-5w1s", "--query-shots", "2")
    keep(run, tmp_path / "omniglot_fomaml", also=("5w5s",))
    _, _, own, other = omniglot_table.table(tmp_path).splitlines()
    for line, preset in ((own, "fomaml-omniglot-5w1s"), (other, "fomaml-omniglot-5w5s")):
        assert line.split("|")[2].strip() == f"{PRESETS[preset].aim} (Nichol et al. 2018)"


def test_the_page_has_the_marks_of_the_table():
    text = (omniglot_table.DOCS / "results.md").read_text(encoding="utf-8")
    assert text.count(omniglot_table.BEGIN) == text.count(omniglot_table.END) == 1


def test_the_plot_is_of_validations(root, tmp_path):
    run = trained(root, tmp_path / "run")
    points = omniglot_plot.curve(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(points) == 2
    assert points == [
        (r["seconds"], 100 * r["validation"], 100 * r["interval"]) for r in lines if "validation" in r
    ]
    pytest.importorskip("matplotlib")
    image = tmp_path / "plot.png"
    omniglot_plot.main(omniglot_plot.Options((f"{run}:FOMAML", str(run)), image, floor=0))
    assert image.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_cannot_be_plotted_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="No such file or directory, expected the metrics of a run"):
        omniglot_plot.curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "seconds": 2.0}\n')
    with pytest.raises(InputError, match="holds no validation; train with --validate-every N"):
        omniglot_plot.curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{")
    with pytest.raises(InputError, match="holds no metrics of a run"):
        omniglot_plot.curve(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match='no matplotlib, which draws the plot; pip install "fomaml'):
        omniglot_plot.main(omniglot_plot.Options((str(tmp_path),)))


def test_every_preset_has_a_command_of_its_own():
    for name in PRESETS:
        algorithm, _, *task = name.split("-")
        path = RUNS / f"{'_'.join(['omniglot', algorithm, *task])}.sh"
        command = path.read_text().splitlines()[-1]
        assert f'exec sh "$(dirname "$0")/omniglot.sh" {path.stem} --preset {name} --seed 0' in command


CALLED = """#!/bin/sh
echo "$@" >> "$CALLS"
"""


def test_the_shared_script_trains_then_goes_on_then_only_judges(tmp_path):
    """With a Python that only says what it was asked."""
    python, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out put"
    python.write_text(CALLED)
    python.chmod(0o755)
    run = out / "omniglot_fomaml_5w1s"
    run.mkdir(parents=True)
    environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "OUT": str(out)}

    def asked(**more):
        calls.write_text("")
        command = ["sh", str(RUNS / "omniglot_fomaml_5w1s.sh")]
        subprocess.run(command, check=True, env=environment | more, cwd=tmp_path)
        return [line.partition("main() ")[2] or line for line in calls.read_text().splitlines()]

    keep = f"runs/omniglot_keep.py {run} --to docs/results/omniglot_fomaml_5w1s"
    train = f"train --preset fomaml-omniglot-5w1s --seed 0 --no-baselines --out {run}"
    assert asked(OMNIGLOT="a b") == [
        f"{train} --data-root a b",
        f"{keep} --data-root a b",
        "runs/omniglot_table.py",
    ]
    environment.pop("OMNIGLOT", None)
    assert asked() == [train, keep, "runs/omniglot_table.py"]
    (run / "config.json").write_text("")
    assert asked() == [f"train --resume {run}", keep, "runs/omniglot_table.py"]
    (run / "result.json").write_text("")
    assert asked() == [keep, "runs/omniglot_table.py"]
