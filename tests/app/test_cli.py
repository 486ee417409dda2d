"""The command line on a small MNIST of its own: what it writes, what it prints, and one line for every mistake."""

import json
import struct
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from commands import refused
from fomaml.app import pretrained, rivals
from fomaml.app.cli import main
from fomaml.app.rundir import load_run, parsed_line

QUICK = ["--iterations", "4", "--test-tasks", "20", "--meta-batch-size", "2", "--query-shots", "3"]
SMALL = ["--model", "conv4-strided", "--channels", "8", "--test-steps", "0", "1", "3"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder in torchvision's layout, 30 training and 30 test images a digit: a bright patch for each."""
    root = tmp_path_factory.mktemp("digits")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    for part in ("train", "t10k"):
        labels = torch.arange(10).repeat(30).to(torch.uint8)
        images = torch.randint(0, 100, (300, 28, 28), generator=random, dtype=torch.uint8)
        for row, label in enumerate(labels.tolist()):
            images[row, 2 * label : 2 * label + 8, 4:24] = 255
        header = struct.pack(">4BIII", 0, 0, 8, 3, 300, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        header = struct.pack(">4BI", 0, 0, 8, 1, 300)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    return root


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    main(["train", "mnist", "--data-root", str(digits), "--out", str(out), *QUICK, "--no-baselines"])
    return out


def test_a_run_directory_holds_all_of_it(run):
    assert sorted(path.name for path in run.iterdir()) == [
        "README.txt",
        "config.json",
        "metrics.jsonl",
        "parts.json",
        "result.json",
        "result.txt",
        "weights.safetensors",
    ]
    config = json.loads((run / "config.json").read_text())
    assert config["inner_lr"] > 0 and config["iterations"] == 4
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == [1, 2, 3, 4]
    result = json.loads((run / "result.json").read_text())
    assert result["tasks"] == 20 and result["protocol"]["data"] == "MNIST"
    assert [row["steps"] for row in result["rows"]] == [0, 1, 5, 10, 20]
    assert "after 20 steps" in (run / "result.txt").read_text()


def test_evaluate_repeats_the_result_of_the_run(run, capsys):
    result = json.loads((run / "result.json").read_text())
    capsys.readouterr()
    main(["evaluate", str(run), "--json"])
    again = json.loads(capsys.readouterr().out)
    for key in ("accuracy", "interval", "protocol", "tasks", "rows"):
        assert again[key] == result[key]
    main(["evaluate", str(run), "--json", "--seed", "9", "--tasks", "7", "--steps", "3"])
    other = json.loads(capsys.readouterr().out)
    assert other["tasks"] == 7 and [row["steps"] for row in other["rows"]] == [3]
    main(["evaluate", str(run)])
    assert "20 unseen tasks" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_weights_and_another_does_not(run, digits, tmp_path):
    base = ["train", "mnist", "--data-root", str(digits), *QUICK, "--no-baselines", "--out"]
    main([*base, str(tmp_path / "same")])
    main([*base, str(tmp_path / "other"), "--seed", "1"])
    own, same, other = (
        torch.cat([p.flatten() for p in load_run(path)[1].parameters()])
        for path in (run, tmp_path / "same", tmp_path / "other")
    )
    assert torch.equal(own, same)
    assert not torch.equal(own, other)


@pytest.fixture
def quick_baselines(monkeypatch):
    """Baselines that learn and are tuned for a few steps; the statistics that each of them is tested by."""
    asked, fine_tune = [], rivals.fine_tune

    def few(*data, statistics, **options):
        asked.append(statistics)
        quick = {"tuning_tasks": 4, "inner_lrs": (0.01, 0.1), "at_steps": (1, 3)}
        return fine_tune(*data, statistics=statistics, **(options | quick))

    monkeypatch.setattr(rivals, "fine_tune", few)
    monkeypatch.setattr(pretrained, "pretrain", partial(pretrained.pretrain, iterations=5))
    return asked


@pytest.mark.parametrize("counts", ["few", pytest.param("those of every run", marks=pytest.mark.long)])
def test_baselines_stand_on_the_same_tasks(counts, digits, tmp_path, capsys, request):
    if counts == "few":
        request.getfixturevalue("quick_baselines")
    main(["train", "mnist", "--data-root", str(digits), "--out", str(tmp_path / "r"), *QUICK, "--shots", "5"])
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    labels = [row["label"] for row in result["rows"][5:]]
    assert [row["to"] for row in result["differences"]] == labels and len(labels) == 3
    headline = result["rows"][4]["mean"]
    for row, difference in zip(result["rows"][5:], result["differences"]):
        assert difference["mean"] == pytest.approx(headline - row["mean"])
    main(
        [
            "train",
            "mnist",
            "--data-root",
            str(digits),
            "--out",
            str(tmp_path / "again"),
            *QUICK,
            "--shots",
            "5",
        ]
    )
    assert json.loads((tmp_path / "again" / "result.json").read_text())["rows"] == result["rows"]
    assert labels[2] == "nearest centroid of the pixels" and result["rows"][-1]["mean"] > 0.9
    printed = capsys.readouterr().out
    assert "iteration 4/4" in printed and "tasks/s" in printed and "run directory" in printed


def test_both_statistics_are_reported_side_by_side(digits, tmp_path, capsys):
    out = tmp_path / "r"
    base = [
        "--data-root",
        str(digits),
        "--out",
        str(out),
        *QUICK,
        *SMALL,
        "--no-baselines",
    ]
    main(["train", "mnist", *base])
    capsys.readouterr()
    main(["evaluate", str(out), "--statistics", "own", "support", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["protocol"]["statistics"] == "own" and result["protocol"]["transductive"]
    support = result["by_statistics"]["support"]
    assert support["protocol"]["statistics"] == "support" and not support["protocol"]["transductive"]
    gap = result["accuracy"] - support["accuracy"]
    assert result["difference"]["mean"] == pytest.approx(gap)
    assert ("warning" in result) == (abs(gap) > result["difference"]["interval"])
    main(["evaluate", str(out), "--statistics", "own", "support", "with-query", "--json"])
    everything = json.loads(capsys.readouterr().out)
    with_query = everything["by_statistics"].pop("with-query")
    assert everything == result
    for statistics, expected in {"support": support, "with-query": with_query}.items():
        main(["evaluate", str(out), "--statistics", statistics, "--json"])
        alone = json.loads(capsys.readouterr().out)
        assert alone["rows"] == expected["rows"] and alone["protocol"] == expected["protocol"]
        assert alone["protocol"]["statistics"] == statistics and not alone["protocol"]["transductive"]
    main(["evaluate", str(out), "--statistics", "own", "support", "with-query"])
    said = capsys.readouterr().out
    kinds = (
        "transductive",
        "inductive, statistics of the support set",
        "inductive, one query example at a time",
    )
    assert [said.count(f"per class, {kind}\n") for kind in kinds] == [1, 1, 1]


@pytest.mark.parametrize("statistics", [pytest.param("support", marks=pytest.mark.long), "with-query"])
def test_a_run_is_tested_by_the_statistics_it_asks_for(statistics, digits, tmp_path, capsys, quick_baselines):
    quick = [*QUICK, *SMALL, "--data-root", str(digits), "--statistics", statistics]
    main(["train", "mnist", *quick, "--out", str(tmp_path / "r")])
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["protocol"]["statistics"] == statistics
    capsys.readouterr()
    found = {}
    for options in ((), ("--statistics", statistics), ("--statistics", "own")):
        main(["evaluate", str(tmp_path / "r"), *options, "--json"])
        found[options] = json.loads(capsys.readouterr().out)
    own, same, other = found.values()
    assert own == same and own["protocol"] == result["protocol"]
    assert own["rows"] == result["rows"][: len(own["rows"])] != other["rows"]
    assert other["protocol"]["transductive"]
    assert len(quick_baselines) > 1 and set(quick_baselines) == {statistics}  # the baselines alike


def test_sinusoid_lowers_the_error(tmp_path, capsys):
    quick = ["--iterations", "300", "--meta-lr", "0.01", "--test-tasks", "50", "--no-baselines"]
    main(["train", "sinusoid", *quick, "--out", str(tmp_path / "r")])
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    errors = {row["steps"]: row["mean"] for row in result["rows"]}
    assert errors[10] < 0.7 * errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "unknown source 'nosuch'; there are: mnist, omniglot, folder:PATH, sinusoid"),
        (
            ["folder"],
            "unknown source 'folder', did you mean folder:PATH? There are: mnist",
        ),
        (["omniglot", "--split", "x"], "unknown split 'x'; there are: maml, vinyals, background-evaluation"),
        (["mnist", "--split", "maml"], "the source mnist takes no --split, got 'maml'"),
        (["folder:x", "--question", "new-digits"], "the source folder takes no --question, got 'new-digits'"),
        (
            ["mnist", "--checkpoint-every", "0"],
            "--checkpoint-every must be a whole number of 1 or more, got 0",
        ),
        (["mnist", "--algorithm", "x"], "unknown algorithm 'x'; there are: fomaml, maml, "),
        (["mnist", "--question", "x"], "unknown question 'x'; there are: new-labels, new-digits"),
        (["mnist", "--model", "x"], "unknown model 'x'; there are: mlp, linear, conv4, conv4-strided"),
        (["mnist", "--engine", "x"], "unknown engine 'x'; there are: auto, loop, batched, factored"),
        (["mnist", "--ways", "11"], "11 ways need 11 classes, but there are 10"),
        (["mnist", "--ways", "6", "--question", "new-digits"], "6 ways need 6 classes, but there are 5"),
        (
            ["mnist", "--shots", "28"],
            "class '0' has 30 examples, but 28 shots + 3 query examples per class need 31",
        ),
        (["mnist", "--inner-lr", "-1"], "--inner-lr must be a positive finite number, got -1.0"),
        (["mnist", "--meta-lr", "nan"], "--meta-lr must be a positive finite number, got nan"),
        (["mnist", "--inner-steps", "0"], "--inner-steps must be a whole number of 1 or more, got 0"),
        (["mnist", "--iterations", "0"], "--iterations must be a whole number of 1 or more, got 0"),
        (
            ["mnist", "--test-steps", "5", "1"],
            "--test-steps must be ascending whole numbers of 0 or more, got [5, 1]",
        ),
        (["mnist", "--device", "nosuch"], "the device 'nosuch' is not there; try cpu, cuda or mps"),
    ],
)
def test_one_line_for_every_mistake_and_nothing_half_written(arguments, message, digits, tmp_path, capsys):
    out = tmp_path / "out"
    quick = [] if "--iterations" in arguments else QUICK
    said = refused(
        capsys, ["train", arguments[0], *quick, *arguments[1:], "--data-root", digits, "--out", out]
    )
    assert said.startswith(message)
    assert not out.exists()


def test_a_missing_cuda_device_is_one_line(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    said = refused(capsys, ["train", "mnist", "--data-root", digits, "--out", out, "--device", "cuda"])
    assert said == "the device 'cuda' is not there: no CUDA device on this machine"
    assert not out.exists()


def test_a_damaged_data_file_is_one_line(digits, tmp_path, capsys):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (digits / "MNIST" / "raw").iterdir():
        raw.joinpath(path.name).write_bytes(path.read_bytes()[:1000])
    said = refused(capsys, ["train", "mnist", "--data-root", tmp_path, "--out", tmp_path / "out"])
    assert "train-images-idx3-ubyte" in said and "1000 bytes" in said
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_holds_a_run_is_left_alone(run, digits, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    said = refused(capsys, ["train", "mnist", "--data-root", digits, "--out", run, *QUICK])
    assert said == f"{run} already holds a run; give another --out, or delete it"
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_folder_of_ones_own_images(tmp_path, capsys):
    random = np.random.default_rng(0)
    for number in range(12):
        directory = tmp_path / "shapes" / f"class{number}"
        directory.mkdir(parents=True)
        for row in range(6):
            pixels = random.integers(0, 60, (20, 24, 3), dtype=np.uint8)
            pixels[number : number + 4] = 255
            Image.fromarray(pixels).save(directory / f"{row}.png")
    out = tmp_path / "run"
    quick = [
        "--iterations",
        "2",
        "--test-tasks",
        "5",
        "--meta-batch-size",
        "2",
        "--query-shots",
        "2",
        "--ways",
        "2",
        "--validation-tasks",
        "3",
    ]
    options = ["--rgb", "--no-baselines", "--out", str(out), *quick]
    main(["train", f"folder:{tmp_path / 'shapes'}", *options])
    assert json.loads((out / "config.json").read_text())["image"] == [3, 20, 24]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics if "validation" in line] == [1, 2]
    capsys.readouterr()
    main(["evaluate", str(out), "--json"])
    assert json.loads(capsys.readouterr().out)["protocol"]["data"] == "shapes"


@pytest.mark.parametrize("killed_after", [3, 5, 8])
def test_a_killed_run_goes_on_and_ends_bit_for_bit_the_same(
    killed_after, digits, tmp_path, monkeypatch, capsys
):
    settings = ["--iterations", "8", "--checkpoint-every", "2", "--test-tasks", "5", "--no-baselines"]
    base = ["train", "mnist", "--data-root", str(digits), *settings, "--out"]
    main([*base, str(tmp_path / "whole")])

    class Killed(BaseException):
        pass

    def die(self, record, seconds):
        if record.iteration == killed_after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("fomaml.app.progress.Watch.__call__", die)
        with pytest.raises(Killed):
            main([*base, str(tmp_path / "killed")])
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as metrics:
        metrics.write('{"iteration": 4, "meta_lo')  # cut in the middle of a line
    main(["train", "--resume", str(tmp_path / "killed")])
    assert f"resuming after iteration {(killed_after - 1) // 2 * 2} of 8" in capsys.readouterr().out
    for name in ("weights.safetensors", "result.txt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    lines = [
        [
            {**parsed_line(line), "seconds": 0}
            for line in (tmp_path / run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        ]
        for run in ("whole", "killed")
    ]
    assert lines[0] == lines[1]
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_resume_refuses_what_cannot_go_on(run, tmp_path, capsys):
    assert refused(capsys, ["train", "--resume", run]).startswith(f"the run in {run} is finished; see ")
    assert refused(capsys, ["train", "--resume", tmp_path]) == f"{tmp_path} holds no run (no config.json)"
    said = refused(capsys, ["train", "--resume", run, "--shots", "3"])
    assert said.startswith(
        "--resume takes the settings of the run, and no --shots; what may be another is --iterations, --device"
    )


def test_evaluate_refuses_what_is_no_run(run, tmp_path, capsys):
    assert refused(capsys, ["evaluate", tmp_path]) == f"{tmp_path} holds no run (no config.json)"
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    assert "was the run finished?" in refused(capsys, ["evaluate", tmp_path])
    (tmp_path / "weights.safetensors").write_bytes((run / "weights.safetensors").read_bytes()[:500])
    assert "weights.safetensors is damaged" in refused(capsys, ["evaluate", tmp_path])
    (tmp_path / "config.json").write_text("{")
    assert "is not the config of a run" in refused(capsys, ["evaluate", tmp_path])


@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "check"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"Example: fomaml {command}" in " ".join(capsys.readouterr().out.split())
