"""The scripts behind the Omniglot figures, on a small Omniglot: rows, tables, errors and the plot."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fomaml.app.build import open_data
from fomaml.app.cli import main
from fomaml.app.presets import PRESETS
from fomaml.app.rundir import load_run
from fomaml.errors import InputError
from runs import omniglot, omniglot_errors, omniglot_plot, omniglot_table
from runs.omniglot import ROWS, Row
from runs.omniglot_table import figure

pytestmark = pytest.mark.usefixtures("small")

PLAIN = Row()


def trained(root, out, preset="fomaml-omniglot-5w1s", *options):
    quick = ["--iterations", "2", "--meta-batch-size", "1", "--test-tasks", "2", "--validation-tasks", "2"]
    steps = ["--channels", "4", "--test-steps", "0", "1", "--no-baselines", "--validate-every", "1"]
    arguments = ["--preset", preset, "--data-root", root, "--out", out, *quick, *steps, *options]
    main(["train", *map(str, arguments)])
    return out


def keep(run, to, row=PLAIN, **options):
    omniglot.keep(run, to, row, omniglot.Options(tasks=3, **options))
    return to


def cells(table):
    """The cells of the rows of a Markdown table, without its heading."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


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
    row = Row(also=("3w2s",), copies=2, turned=True, balanced=True)
    folder = keep(run, tmp_path / "results" / "omniglot_best", row)
    judged = json.loads((folder / "evaluations.json").read_text())["evaluations"]
    tasks = [
        tuple(found["protocol"][k] for k in ("ways", "shots", "query_shots", "copies")) for found in judged
    ]
    assert tasks[:5] == [(5, 1, 1, 1), (5, 1, 15, 1), (5, 1, 1, 2), (5, 1, 1, 1), (5, 1, 1, 1)]
    assert tasks[5:] == [(3, 2, 2, 1), (3, 2, 15, 1), (3, 2, 2, 2), (3, 2, 2, 1), (3, 2, 2, 1)]
    choices = [(found["protocol"]["test_augment"], found["protocol"]["balanced"]) for found in judged]
    assert choices == [*3 * [("none", False)], ("turns", False), ("turns", True)] * 2
    assert judged[2]["protocol"]["jitter"] == 0.125 and [row["steps"] for row in judged[2]["rows"]] == [1]
    [kept] = omniglot_table.load(tmp_path / "results")
    assert kept.tasks() == [(3, 2), (5, 1)]
    link = "[best-omniglot](results/omniglot_best)"
    texts = ("1 query image", "15 query images", "1 query image", "1 query image", "1 query image")
    choices = ("", "", ", 2 copies", ", classes turned", ", classes turned, balanced")
    protocols = cells(omniglot_table.appendix([kept]).split("\n\n")[1])
    for task, part, rows in (((3, 2), judged[5:], protocols[:5]), ((5, 1), judged[:5], protocols[5:])):
        _, published, here, support, _ = omniglot_table.row(kept, task)
        turned = part[3]
        assert here == f"{figure(turned)} transductive, 3 tasks"
        assert support == figure(turned["by_statistics"]["support"])
        assert published == ("95.8 ± 0.3 (Finn et al. 2017)" if task == (5, 1) else "")
        for found, text, choice, line in zip(part, texts, choices, rows, strict=True):
            queries = text if task == (5, 1) else text.replace("1 query image", "2 query images")
            assert line == [
                f"{omniglot_table.name_of(task)}, {link}",
                f"{queries} per class{choice}, 3 tasks",
                figure(found),
                figure(found["by_statistics"]["support"]),
                "",
            ]


def test_a_head_of_so_many_ways_takes_no_other(root, tmp_path, capsys):
    run = trained(root, tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--ways", "4"])
    assert "learned a head for 5 ways, got --ways 4" in capsys.readouterr().err


def test_the_last_weights_are_kept_where_asked_for(root, tmp_path, capsys):
    run = trained(root, tmp_path / "run")
    (run / "weights.safetensors").write_bytes(b"the best ones, which nobody reads")
    folder = keep(run, tmp_path / "results" / "omniglot_last", Row(weights="last"))
    assert (folder / "weights.safetensors").read_bytes() == (run / "last.safetensors").read_bytes()
    assert json.loads((folder / "evaluations.json").read_text())["weights"] == "last"
    [kept] = omniglot_table.load(tmp_path / "results")
    assert omniglot_table.iterations(kept) == "2"
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


def page(path, *names):
    """A page with the marks of these tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    marks = "".join(f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n" for name in names)
    path.write_text(f"before\n{marks}after\n")
    return path


def test_the_tables_set_published_beside_measured(root, tmp_path):
    docs = tmp_path / "docs"
    for name in ("reptile-omniglot-5w1s", "fomaml-omniglot-5w1s"):
        run = trained(root, tmp_path / name, name, "--seed", "3")
        keep(run, docs / "results" / omniglot.folder(name))
    results = page(docs / "results.md", "omniglot", "omniglot appendix")
    readme = page(tmp_path / "README.md", "omniglot")
    omniglot_table.main(tmp_path)
    text = results.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    main_table, training, protocols = (
        [line for line in part.splitlines() if line.startswith("|")]
        for part in (
            text.split("<!-- omniglot: end -->")[0],
            *text.split("omniglot appendix: begin")[1].split("\n\n"),
        )
    )
    for lines in (main_table, training, protocols):
        assert {line.count("|") for line in lines} == {6}  # five columns
    assert "### 5-way 1-shot" in text
    published = []
    for line, trained_line, name in zip(
        cells("\n".join(main_table)),
        cells("\n".join(training)),
        ("fomaml-omniglot-5w1s", "reptile-omniglot-5w1s"),
    ):
        folder = docs / "results" / omniglot.folder(name)
        own, _ = json.loads((folder / "evaluations.json").read_text())["evaluations"]
        support = own["by_statistics"]["support"]
        published.append(own if name.startswith("fomaml") else own["by_statistics"]["with-query"])
        assert line[0] == f"[{name}](results/{folder.name})" == trained_line[0]
        assert line[1] == f"{PRESETS[name].aim} (Nichol et al. 2018)"
        assert line[2] == f"{figure(published[-1])} {omniglot_table.kind(published[-1])}, 3 tasks"
        assert line[3] == figure(support)
        assert trained_line[1] == f"`python runs/omniglot.py {name}`"
        assert trained_line[2].startswith("2, best at ") and trained_line[3] == "3"
    rows = cells("\n".join(protocols))
    assert [row[1].split(" per ")[0] for row in rows] == ["1 query image", "15 query images"] * 2
    assert [row[4] for row in rows] == ["", "", figure(published[1]), ""]
    overview = [line for line in readme.read_text().splitlines() if line.startswith("|")]
    assert cells("\n".join(overview))[1] == ["FOMAML, here", figure(published[0]), "", "", ""]
    both = results.read_text(), readme.read_text()
    omniglot_table.main(tmp_path)
    assert (results.read_text(), readme.read_text()) == both
    readme.write_text("no marks")
    with pytest.raises(InputError, match="needs the marks"):
        omniglot_table.main(tmp_path)


def test_other_shots_stand_beside_the_same_algorithm(root, tmp_path):
    run = trained(root, tmp_path / "run", "fomaml-omniglot-5w1s-short", "--query-shots", "2")
    keep(run, tmp_path / "omniglot_fomaml", Row(also=("5w5s",)))
    [kept] = omniglot_table.load(tmp_path)
    for task, preset in (((5, 1), "fomaml-omniglot-5w1s"), ((5, 5), "fomaml-omniglot-5w5s")):
        assert omniglot_table.row(kept, task)[1] == f"{PRESETS[preset].aim} (Nichol et al. 2018)"


def test_the_pages_hold_the_tables_of_what_is_kept():
    kept = omniglot_table.load(omniglot_table.ROOT / "docs" / "results")
    results = (omniglot_table.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    readme = (omniglot_table.ROOT / "README.md").read_text(encoding="utf-8")
    for text, name, table in (
        (results, "omniglot", omniglot_table.tables(kept)),
        (results, "omniglot appendix", omniglot_table.appendix(kept)),
        (readme, "omniglot", omniglot_table.overview(kept)),
    ):
        assert f"<!-- {name}: begin -->\n{table}\n<!-- {name}: end -->" in text
    for run in kept:
        assert run.row() in ROWS and omniglot.folder(run.row()) == run.name


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


def test_every_preset_of_omniglot_is_a_row(capsys):
    assert list(ROWS) == [name for name in PRESETS if "omniglot" in name]
    omniglot.main(omniglot.Options(show=True))
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(ROWS)
    for options, message in (
        (("nosuch",), "unknown row 'nosuch'; there are: "),
        ((), "give the name of a row"),
    ):
        with pytest.raises(InputError, match=message):
            omniglot.main(omniglot.Options(*options))


def test_a_row_is_trained_then_gone_on_with_then_only_judged(tmp_path, monkeypatch):
    """With a command line that only notes what it was asked."""
    asked, kept, threads = [], [], torch.get_num_threads()
    monkeypatch.setattr(omniglot.cli, "main", asked.append)
    monkeypatch.setattr(omniglot, "keep", lambda run, to, row, options: kept.append((run, to, row)))
    monkeypatch.setattr(omniglot.subprocess, "run", lambda command, check: kept.append(command[1].name))
    name, run = "fomaml-omniglot-5w1s-short", tmp_path / "omniglot_fomaml_5w1s_short"
    options = omniglot.Options(name, out=tmp_path, data_root=tmp_path / "a b", threads=threads)
    train = ["train", "--preset", name, "--no-baselines", "--compile", "yes", "--out", str(run)]

    def steps(options):
        asked.clear()
        omniglot.main(options)
        return list(asked)

    assert steps(options) == [[*train, "--data-root", str(tmp_path / "a b")]]
    assert steps(replace(options, data_root=None)) == [train]
    run.mkdir()
    (run / "config.json").write_text("")
    assert steps(options) == [["train", "--resume", str(run)]]
    (run / "result.json").write_text("")
    assert steps(options) == []
    docs = omniglot_table.ROOT / "docs" / "results" / run.name
    assert kept == 4 * [(run, docs, ROWS[name]), "omniglot_table.py"]


def test_a_row_from_training_to_what_is_kept(root, tmp_path, monkeypatch):
    quick = ["--iterations", "2", "--meta-batch-size", "1", "--test-tasks", "2", "--validation-tasks", "2"]
    monkeypatch.setitem(ROWS, "fomaml-omniglot-5w1s", Row(options=(*quick, "--channels", "4")))
    monkeypatch.setattr(omniglot, "HERE", tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    renew = "from pathlib import Path; (Path(__file__).parent / 'renewed').touch()"
    (tmp_path / "runs" / "omniglot_table.py").write_text(renew)
    options = {"data_root": root, "out": tmp_path / "out", "threads": torch.get_num_threads(), "tasks": 3}
    omniglot.main(omniglot.Options("fomaml-omniglot-5w1s", **options))
    [kept] = omniglot_table.load(tmp_path / "docs" / "results")
    assert kept.config["preset"] == kept.row() == "fomaml-omniglot-5w1s" and kept.config["data_root"] is None
    assert [each["tasks"] for each in kept.judged["evaluations"]] == [3, 3]
    assert (tmp_path / "runs" / "renewed").exists()
