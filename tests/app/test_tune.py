"""`fomaml tune`: trials are trainings as `fomaml train` makes them, recorded, resumable, as many for each method."""

import json
import shlex

import numpy as np
import pytest

from commands import refused
from fomaml.app import pretrained, rivals, tune
from fomaml.app.cli import main
from fomaml.tuning import LogUniform, settings_of
from mnist_files import idx

pd = pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
SHORT = "--meta-batch-size 2 --validation-tasks 6 --test-tasks 6 --test-steps 0 1 3 --shots 2 --query-shots 3"
SINUSOID = f"sinusoid --iterations 40 --trial-iterations 6 {SHORT} --no-baselines"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """MNIST of random images, 10 of each digit."""
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = np.random.default_rng(0).integers(0, 256, (100, 28, 28)), np.arange(100) % 10
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return root


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    random = np.random.default_rng(0)
    machine = np.repeat(np.arange(12), 8)
    load = random.random(len(machine))
    frame = pd.DataFrame({"machine": machine, "load": load, "wear": 5 * load + machine})
    path = tmp_path_factory.mktemp("tune") / "machines.csv"
    frame.to_csv(path, index=False)
    return f"table:{path} --task machine --target wear --iterations 40 --trial-iterations 6 {SHORT}"


def tuned(text, out, *more):
    main(["tune", *text.split(), "--out", str(out), *more])
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    return json.loads((out / "best.json").read_text()), lines


@pytest.fixture
def quick(monkeypatch):
    """Networks pretrained for a few steps, and no forest."""
    pretrain = pretrained.pretrain
    monkeypatch.setattr(
        pretrained, "pretrain", lambda *data, **options: pretrain(*data, **(options | {"iterations": 5}))
    )
    monkeypatch.setattr(rivals, "ESTIMATORS", {"ridge": "ridge"})


def test_a_trial_is_a_training_as_any_other(table, tmp_path):
    best, lines = tuned(table, tmp_path / "tuned", "--trials", "3", "--no-baselines")
    for line in lines:
        own = line["settings"]
        options = [f"--{name.replace('_', '-')}={value}" for name, value in own.items()]
        run = tmp_path / f"run{line['number']}"
        steps = ["--test-steps", *map(str, range(line["at_steps"] + 1))]
        text = table.replace("--trial-iterations 6", "").replace("--iterations 40", "--iterations 6")
        text = text.replace("--test-steps 0 1 3", "")
        main(["train", *text.split(), *options, *steps, "--out", str(run), "--no-baselines"])
        metrics = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        validation = [row["validation"] for row in metrics if "validation" in row]
        assert validation[-1] == pytest.approx(line["score"], rel=1e-6)
    scores = [line["score"] for line in lines]
    assert best["methods"]["FOMAML"]["score"] == min(scores)
    chosen = lines[scores.index(min(scores))]
    assert best["settings"] == chosen["settings"] | {
        "test_steps": [k for k in (0, 1, 3) if k <= chosen["at_steps"]]
    }


def test_the_line_at_the_end_trains_with_the_best(tmp_path, capsys):
    best, _ = tuned(SINUSOID, tmp_path / "a b", "--trials", "3", "--clip", "2")
    program, command, *options = shlex.split(best["command"])
    assert (program, command) == ("fomaml", "train") and best["command"] in capsys.readouterr().out
    main(["train", *options, "--dry-run"])
    shown = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    for name, value in best["settings"].items():
        values = list(map(str, value)) if isinstance(value, list) else [str(value)]
        assert shown[name] == [*values, "given"]
    for name, value in (("iterations", "40"), ("clip", "2.0"), ("baselines", "False")):
        assert shown[name] == [value, "given"]


def test_as_many_trials_for_each_method_that_has_something_to_tune(table, tmp_path, quick, capsys):
    pytest.importorskip("sklearn", reason="needs scikit-learn, of the extra metrics")
    best, lines = tuned(table, tmp_path / "tuned", "--trials", "4", "--seed", "2", "--metric", "mae")
    counts = {
        label: [line["number"] for line in lines if line["method"] == label] for label in best["methods"]
    }
    assert list(counts) == [
        "FOMAML", "random start, support set only", "all tasks pooled, fine-tuned",
        "all tasks pooled, head fine-tuned", "ridge, support set and pooled rows", "ridge, support set only",
    ]  # fmt: skip
    assert all(numbers == [0, 1, 2, 3] for numbers in counts.values())
    text = capsys.readouterr().out
    for label, found in best["methods"].items():
        scores = {
            n: line["score"] for n, line in enumerate(lines) if line["method"] == label and line["score"]
        }
        assert found["score"] == min(scores.values())  # of an error less is better
        assert found["settings"] == lines[min(scores, key=scores.get)]["settings"]
        assert f"{label}, trial 4 of 4: " in text


@pytest.mark.parametrize("lost", ["nothing", "half a line", "two lines"])
def test_a_killed_search_goes_on(lost, table, tmp_path, quick, monkeypatch):
    table += " --no-baselines" if lost != "half a line" else ""  # quicker
    whole, lines = tuned(table, tmp_path / "whole", "--trials", "3")
    real, done = tune.trained, []

    def dies(settings, data):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(settings)
        return real(settings, data)

    with monkeypatch.context() as broken:
        broken.setattr(tune, "trained", dies)
        with pytest.raises(SystemExit):
            tuned(table, tmp_path / "killed", "--trials", "3")
    record = tmp_path / "killed" / "trials.jsonl"
    text = record.read_text()
    assert text.count("\n") == 2 and not (tmp_path / "killed" / "best.json").exists()
    if lost == "half a line":
        record.write_text(text + '{"method": "FOM')
    elif lost == "two lines":
        record.write_text("")
    calls = []
    monkeypatch.setattr(tune, "trained", lambda *given: calls.append(given) or real(*given))
    main(["tune", "--resume", str(tmp_path / "killed")])
    assert len(calls) == (3 if lost == "two lines" else 1)
    assert json.loads((tmp_path / "killed" / "best.json").read_text()) == whole
    assert [json.loads(line) for line in record.read_text().splitlines()] == lines
    more = [line for line in lines if line["method"] == "FOMAML"]
    calls.clear()
    main(["tune", "--resume", str(tmp_path / "killed"), "--trials", "4"])
    again = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(calls) == 1 and again[: len(lines)] == lines
    assert [line for line in again if line["method"] == "FOMAML"][:3] == more


def test_what_is_given_is_not_searched_and_ranges_are_kept(tmp_path):
    options = "--inner-lr 0.02 --inner-steps-range 2 3 --meta-lr-range 0.01 0.02 --search-seed 5 --trials 4"
    best, lines = tuned(SINUSOID, tmp_path / "tuned", *options.split())
    assert all(set(line["settings"]) == {"inner_steps", "meta_lr"} for line in lines)
    assert {line["settings"]["inner_steps"] for line in lines} == {2, 3}
    assert all(0.01 <= line["settings"]["meta_lr"] <= 0.02 for line in lines)
    assert "--inner-lr 0.02" in best["command"]
    kept = json.loads((tmp_path / "tuned" / "tune.json").read_text())
    assert kept["space"] == {"inner_steps": [2, 3], "meta_lr": [0.01, 0.02]}
    expected = {"inner_steps": LogUniform(2, 3, whole=True), "meta_lr": LogUniform(0.01, 0.02)}
    assert [line["settings"] for line in lines] == [settings_of(expected, 5, n) for n in range(4)]


def test_what_diverges_is_recorded_and_never_best(tmp_path, capsys):
    best, lines = tuned(SINUSOID, tmp_path / "tuned", "--trials", "6", "--inner-lr-range", "0.01", "1e12")
    failed = [line for line in lines if line["score"] is None]
    assert failed and all("nan" in line["reason"] or "inf" in line["reason"] for line in failed)
    assert best["methods"]["FOMAML"]["score"] == min(
        line["score"] for line in lines if line["score"] is not None
    )
    assert "failed, " in capsys.readouterr().out


def test_of_classes_without_validation_it_says_on_what(digits, tmp_path, capsys, quick):
    text = f"mnist --data-root {digits} --iterations 10 --trial-iterations 2 {SHORT} --trials 2"
    best, lines = tuned(text, tmp_path / "tuned")
    assert list(best["methods"]) == [
        "FOMAML", "random start, support set only", "pretrained classifier, fine-tuned",
    ]  # fmt: skip
    assert len(lines) == 6 and best["unit"] == "%"
    assert "6 tasks like those of training, other ones: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sinusoid --trials 0", "--trials must be a whole number of 1 or more, got 0"),
        ("sinusoid --trial-iterations 0", "--trial-iterations must be a whole number of 1 or more, got 0"),
        ("sinusoid --seconds 3", "a search counts iterations: give --trial-iterations, no --seconds"),
        (
            "sinusoid --inner-lr 1 --inner-steps 1 --meta-lr 1",
            "there is nothing to search: leave out one of --inner-lr, --inner-steps, --meta-lr",
        ),
        ("sinusoid --inner-lr 1 --inner-lr-range 1 2", "--inner-lr is given, and so not searched: give no"),
        (
            "sinusoid --inner-lr-range 2 1",
            "--inner-lr-range is the least and the greatest value, got 2 and 1",
        ),
        (
            "sinusoid --meta-lr-range 0 1",
            "each number of --meta-lr-range must be a positive finite number, got 0",
        ),
        (
            "sinusoid --inner-steps-range 0 1",
            "each number of --inner-steps-range must be a whole number of 1",
        ),
        ("", "name a source of tasks: "),
        ("table:none.csv --task a --target b", "no file none.csv"),
        ("--resume FOLDER", "FOLDER holds no search (no tune.json)"),
        (
            "--resume FOLDER --shots 3",
            "--resume takes the options of the search; no other option goes with it",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(text, message, tmp_path, capsys):
    out = tmp_path / "out"
    own = [each.replace("FOLDER", str(tmp_path)) for each in text.split()]
    told = refused(capsys, ["tune", *own, *([] if "--resume" in own else ["--out", str(out)])])
    assert message.replace("FOLDER", str(tmp_path)) in told and not out.exists()


def test_a_folder_that_holds_a_search_is_kept(tmp_path, capsys):
    _, lines = tuned(SINUSOID, tmp_path / "tuned", "--trials", "1")
    told = refused(capsys, ["tune", *SINUSOID.split(), "--out", str(tmp_path / "tuned")])
    assert f"already holds a search; give another --out, or --resume {tmp_path / 'tuned'}" in told
    (tmp_path / "tuned" / "trials.jsonl").write_text('{"x": 1}\n' + json.dumps(lines[0]) + "\n")
    told = refused(capsys, ["tune", "--resume", str(tmp_path / "tuned")])
    assert "line 1 of" in told and "is no trial" in told
