"""Tables, arrays and recordings on the command line: trained, resumed, evaluated, compared, and refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from commands import refused
from fomaml.app import compare, session
from fomaml.app.cli import main
from fomaml.app.judge import evaluate_run
from fomaml.app.rundir import load_run, load_settings
from fomaml.app.settle import settle

pd = pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
QUICK = "--iterations 4 --meta-batch-size 2 --test-tasks 8 --validation-tasks 4 --test-steps 0 1 --shots 2"
QUICK += " --query-shots 3 --no-baselines"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten machines in a table and in arrays, and recordings of six subjects in arrays; "idle" has three rows."""
    folder = tmp_path_factory.mktemp("groups")
    random = np.random.default_rng(0)
    machine = np.repeat([f"m{number}" for number in range(10)], random.integers(12, 20, 10))
    rows = len(machine)
    frame = pd.DataFrame({
        "machine": machine,
        "hour": random.permutation(rows),
        "load": random.random(rows),
        "tool": np.array(["mill", "lathe"])[random.integers(0, 2, rows)],
        "wear": 100 + 50 * random.random(rows),
        "state": np.array(["good", "bad"])[np.arange(rows) % 2],
    })  # fmt: skip
    frame.to_csv(folder / "machines.csv", index=False)
    idle = frame.iloc[:3].assign(machine="idle")
    pd.concat([frame, idle]).to_csv(folder / "small.csv", index=False)
    frame.assign(load=frame.load.where(frame.index != 4)).to_csv(folder / "missing.csv", index=False)
    frame.to_csv(folder / "semicolon.csv", index=False, sep=";")
    frame.assign(wear=frame.wear.where(frame.machine != "m3", 4.0)).to_csv(folder / "steady.csv", index=False)
    arrays = {
        "x": frame[["load", "hour"]].to_numpy(),
        "machine": machine,
        "wear": frame.wear,
        "state": frame.state,
    }
    arrays = {
        key: np.asarray(value, dtype=None if key in ("x", "wear") else str) for key, value in arrays.items()
    }
    frame.to_csv(folder / "comma.csv", index=False, sep=";", decimal=",")
    more = {"hour": frame.hour, "load": frame.load, "series": np.ones((rows, 3, 8), np.uint8)}
    np.savez(folder / "machines.npz", **arrays, **more, objects=np.array([None] * rows))
    lengths = np.full(12, 60)
    np.savez(
        folder / "motion.npz",
        samples=random.normal(size=(720, 2)).astype(np.float32),
        bits=random.integers(-300, 300, (720, 2), dtype=np.int16),
        lengths=lengths,
        subject=np.arange(12) // 2,
        motion=np.arange(12) % 2,
    )
    return folder


def command(data, text):
    """The arguments of `fomaml train`, with {data} in the place of the folder."""
    return [each.replace("DATA", str(data)) for each in text.split()]


TABLE = f"table:DATA/machines.csv --task machine --target wear --order hour --features load hour {QUICK}"
LABELS = f"table:DATA/machines.csv --task machine --target state --features load hour {QUICK}"
ARRAYS = f"arrays:DATA/machines.npz --task machine --inputs x --target wear {QUICK}"
CUT = "--inputs samples --lengths lengths --task subject --target motion --window 8 --hop 4"
WINDOWS = f"windows:DATA/motion.npz {CUT} {QUICK}"


@pytest.mark.parametrize(
    ("text", "metric", "shapes"),
    [
        (TABLE, "rmse", [2]),
        (TABLE + " --query-all", "rmse", [2]),
        (TABLE + " --categorical tool", "rmse", {"numbers": [2], "categories": [1]}),
        (LABELS, "accuracy", [2]),
        (ARRAYS, "rmse", [2]),
        (ARRAYS.replace("--inputs x", "--inputs load"), "rmse", [1]),
        (ARRAYS.replace("--target wear", "--target state"), "accuracy", [2]),
        (WINDOWS, "accuracy", [2, 8]),
        (WINDOWS + " --model gru", "accuracy", [2, 8]),
        (WINDOWS.replace("samples", "bits"), "accuracy", [2, 8]),
    ],
)
def test_a_run_is_trained_and_evaluated_again(text, metric, shapes, data, tmp_path, capsys):
    main(["train", *command(data, text), "--out", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metric"] == metric and result["protocol"]["groups"] >= 1
    settings = load_settings(tmp_path / "run")
    assert settings.facts["shapes"] == shapes and settings.facts["split"]["test"]
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run"), "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["rows"] == result["rows"] and again[metric] == result[metric]
    main(["evaluate", str(tmp_path / "run"), "--part", "validation"])


def test_results_are_in_the_unit_of_the_targets(data, tmp_path):
    """Of a network that gives the training mean, the RMSE is the one that pandas computes."""
    main(
        ["train", *command(data, TABLE), "--out", str(tmp_path / "run"), "--inner-lr", "1e-9", "--query-all"]
    )
    settings, learner = load_run(tmp_path / "run")
    frame = pd.read_csv(data / "machines.csv")
    split = settings.facts["split"]
    mean = frame[frame.machine.isin(split["train"])].wear.mean()
    for parameter in learner.model.parameters():
        torch.nn.init.zeros_(parameter)
    found = evaluate_run(settings, learner)
    expected = []
    for name in split["test"]:
        later = frame[frame.machine == name].sort_values("hour").wear.to_numpy()[2:]
        expected.append(np.sqrt(np.mean((later - mean) ** 2)))
    assert found["rmse"] == pytest.approx(np.mean(expected), rel=1e-5)
    interval = 1.96 * np.std(expected, ddof=1) / np.sqrt(len(expected))
    assert found["interval"] == pytest.approx(interval, rel=1e-4)


def test_a_killed_run_goes_on_to_the_same_bits(data, tmp_path, monkeypatch):
    text = [*command(data, TABLE), "--checkpoint-every", "1"]
    main(["train", *text, "--out", str(tmp_path / "whole")])

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "finish", killed)
        with pytest.raises(SystemExit):
            main(["train", *text, "--out", str(tmp_path / "half")])
    main(["train", "--resume", str(tmp_path / "half")])
    whole, half = (load_run(tmp_path / name)[1] for name in ("whole", "half"))
    for own, other in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(own, other)


def test_several_algorithms_are_compared_over_groups(data, tmp_path, monkeypatch):
    """In this process: each of its own is a matter of tests/app/test_compare.py."""
    monkeypatch.setattr(compare, "isolated", lambda function, *given: function(*given, threads=1))
    text = [*command(data, TABLE), "--algorithms", "reptile", "--out", str(tmp_path / "both")]
    main(["compare", *text])
    result = json.loads((tmp_path / "both" / "compare.json").read_text())
    rows = result["rows"]
    assert [row["algorithm"] for row in rows] == ["fomaml", "reptile"] and "difference" in rows[1]
    assert result["protocol"]["groups"] == 2
    assert "± 95 % interval over the groups" in (tmp_path / "both" / "compare.txt").read_text()


def test_the_data_decide_what_is_not_given(data):
    def settled(text):
        options = {"source": f"table:{data}/machines.csv", "task": "machine", "features": ("load",), **text}
        return settle(**options)

    regression = settled({"target": ("wear",)})
    assert (regression.kind, regression.draw, regression.train_draw) == ("regression", "random", "random")
    assert settled({"target": ("wear",), "order": "hour"}).draw == "first"
    labels = settled({"target": ("state",)})
    assert (labels.kind, labels.ways, labels.train_ways, labels.fixed_classes) == (
        "classification",
        2,
        2,
        True,
    )
    assert settled({"target": ("state",), "ways": 2}).fixed_classes is False


def test_groups_that_make_one_task_each_are_visited_once(data, tmp_path):
    text = command(data, TABLE.replace("--test-tasks 8", "--test-tasks 200"))
    main(["train", *text, "--query-all", "--out", str(tmp_path / "run")])
    settings = load_settings(tmp_path / "run")
    assert (settings.test_tasks, settings.validation_tasks) == (2, 2)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["tasks"] == 2


def test_tasks_are_split_by_their_keys(data, tmp_path):
    main(["train", *command(data, TABLE), "--out", str(tmp_path / "run"), "--test-keys", "m3", "m5",
          "--validation-keys", "m0"])  # fmt: skip
    split = load_settings(tmp_path / "run").facts["split"]
    assert split == {
        "train": ["m1", "m2", "m4", "m6", "m7", "m8", "m9"],
        "validation": ["m0"],
        "test": ["m3", "m5"],
    }


def test_what_is_left_out_is_told(data, tmp_path, capsys):
    text = [*command(data, TABLE.replace("machines", "small")), "--out", str(tmp_path / "run")]
    assert (
        "'idle' has 3 rows, but 2 shots + 3 query rows need 5; leave them out (--skip-small-groups)"
        in refused(capsys, ["train", *text])
    )
    assert not (tmp_path / "run").exists()
    main(["train", *text, "--skip-small-groups"])
    assert "left out 1 with too few rows (idle 3)" in capsys.readouterr().out
    text = [
        *command(data, TABLE.replace("machines", "missing")),
        "--out",
        str(tmp_path / "other"),
        "--drop-missing",
    ]
    main(["train", *text])
    assert "1 rows with missing values left out" in capsys.readouterr().out


def test_data_that_have_changed_are_refused(data, tmp_path, capsys):
    frame = pd.read_csv(data / "machines.csv")
    frame.to_csv(tmp_path / "own.csv", index=False)
    main(
        [
            "train",
            *command(data, LABELS.replace("DATA/machines", f"{tmp_path}/own")),
            "--out",
            str(tmp_path / "run"),
        ]
    )
    frame.assign(state=frame.state.where(frame.hour != 5, "worn")).to_csv(tmp_path / "own.csv", index=False)
    assert "classes were ['bad', 'good'], are ['bad', 'good', 'worn']" in refused(
        capsys, ["evaluate", tmp_path / "run"]
    )
    test = load_settings(tmp_path / "run").facts["split"]["test"][0]
    frame[frame.machine != test].to_csv(tmp_path / "own.csv", index=False)
    assert f"no task '{test}' here" in refused(capsys, ["evaluate", tmp_path / "run"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("table:DATA/machines.csv", "the source table needs --task: fomaml train table:FILE --task TASK --target"),
        ("table:DATA/machines.csv --task machine", "the source table needs --target"),
        ("table --task machine --target wear", "unknown source 'table'"),
        ("arrays:DATA/machines.npz --task machine --target wear", "the source arrays needs --inputs"),
        ("windows:DATA/motion.npz --inputs samples --task subject --target motion", "needs --lengths"),
        (TABLE.replace("--target wear", "--target wer"), "no column 'wer'; there are: wear, "),
        (TABLE.replace("load hour", "load tool"), "holds text, expected numbers: "),
        (TABLE.replace("machines", "missing"), "or drop these rows (--drop-missing)"),
        (TABLE.replace("machines", "semicolon"), "separated by ';': give --separator ';'"),
        (TABLE.replace("machines", "none"), "no file "),
        (TABLE.replace("machines", "comma") + " --separator ;", "with a comma for the decimal point: give --decimal ,"),
        (ARRAYS.replace("--inputs x", "--inputs hour"), "the inputs are torch.int64 and the model"),
        (ARRAYS.replace("--inputs x", "--inputs series --model conv1d"), "torch.float32: save them as float32"),
        (ARRAYS.replace("--inputs x", "--inputs y"), "no array 'y'; there are: "),
        (ARRAYS.replace("--inputs x", "--inputs objects"), "never unpickled"),
        (ARRAYS.replace("--inputs x", "--inputs x wear"), "'wear' is given both as --target and as --inputs"),
        (WINDOWS.replace("--hop 4", "--hop 0"), "hop must be a whole number of 1 or more, got 0"),
        (ARRAYS.replace("machines.npz", "machines.csv"), "cannot be read as an .npz file"),
        (WINDOWS.replace("--window 8", "--window 80"), "12 of 12 recordings are shorter than a window of 80"),
        (WINDOWS + " --draw random", "windows that overlap would share samples"),
        (WINDOWS + " --gap 0", "windows that overlap would share samples"),
        (LABELS + " --draw first", "--draw first needs rows in an order: give --order"),
        (TABLE + " --gap 30", "2 shots + a gap of 30 + 3 query rows need 35; take fewer"),
        (TABLE + " --ways 2", "regression, which has no classes: give no --ways"),
        (TABLE + " --algorithm proto-maml", "needs classes: the source table has none"),
        (TABLE + " --model conv4", "conv4 takes images (channels, height, width), but an input has the shape (2,)"),
        (LABELS + " --train-ways 1 --algorithm zero-head", "a task has the 2 classes of the data"),
        (LABELS + " --ways 3", "too few classes"),
        (TABLE + " --model conv1d", "conv1d takes series (channels, time), got inputs of shape [2]: take --model mlp"),
        (TABLE + " --model gru --channels 4", "the model gru is not one of images: no --channels 4"),
        (TABLE + " --categorical tool --algorithm cavia", "cavia takes one input, got numbers and the categories tool"),
        (TABLE + " --categorical tool --model conv4", "numbers and categories, but the model conv4 takes one"),
        (ARRAYS.replace("--inputs x", "--inputs x hour"), "the inputs are x and hour, but the model mlp takes one"),
        (ARRAYS.replace("--target wear", "--target wear hour"), "are wear and hour, and the model mlp gives one"),
        (TABLE.replace("machines", "steady") + " --metric rmse r2", "r2 says nothing of targets that do not vary"),
        (TABLE + " --fewer-classes", "--fewer-classes is for classification"),
        (LABELS + " --ways 2 --fewer-classes", "give no --fewer-classes"),
        (TABLE + " --augment rotations", "the source table is of groups: --augment must be none"),
        (LABELS + " --jitter 0.1", "the source table is of groups: --jitter must be 0"),
        (TABLE + " --shares 0.5 0.5 0.5", "--shares must add up to 1, got 0.5 0.5 0.5"),
        (TABLE + " --shares 0.99 0 0.01", "10/0/0 into train/validation/test"),
        (TABLE + " --test-keys m77", "no task 'm77' here; there are: m"),
        (TABLE + " --validation-keys m1", "need one for the test: give --test-keys"),
        (TABLE + " --test-keys m1 --shares 0.5 0.2 0.3", "no shares are of use"),
        (TABLE + " --window 8", "the source table takes no --window, got 8"),
        ("sinusoid --no-scale", "the source sinusoid takes no --scale"),
        ("mnist --task machine", "the source mnist takes no --task, got 'machine'"),
        (TABLE + " --kind ranking", "ranking"),
        (TABLE.replace("--target wear", "--target wear --kind classification"), "numbers such as"),
    ],
)  # fmt: skip
def test_refused_in_one_line_and_nothing_is_written(text, expected, data, tmp_path, capsys):
    said = refused(capsys, ["train", *command(data, text), "--out", tmp_path / "run"])
    assert expected in said
    assert not (tmp_path / "run").exists()


# --- folders of tasks -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders TASK/CLASS/IMAGE: `same` with two classes in each of five tasks, `own` with other classes in each."""
    root = tmp_path_factory.mktemp("places")
    random = np.random.default_rng(0)
    for task in range(5):
        for number in range(3):
            names = {"same": f"class{number}"} if number < 2 else {}
            for kind, name in {**names, "own": f"class{task}{number}"}.items():
                folder = root / kind / f"task{task}" / name
                folder.mkdir(parents=True)
                for image in range(6):
                    Image.fromarray(random.integers(0, 255, (12, 12), dtype=np.uint8)).save(
                        folder / f"{image}.png"
                    )
    return root


@pytest.mark.parametrize(
    ("kind", "options", "ways", "fixed"),
    [("same", "", 2, True), ("same", "--ways 2", 2, False), ("own", "--ways 3", 3, False)],
)
def test_a_folder_may_have_tasks(kind, options, ways, fixed, places, tmp_path, capsys):
    text = f"folder:{places / kind} --model mlp {QUICK} {options}"
    main(["train", *text.split(), "--out", str(tmp_path / "run")])
    settings = load_settings(tmp_path / "run")
    assert (settings.ways, settings.fixed_classes, settings.facts["shapes"]) == (ways, fixed, [1, 12, 12])
    parts = [settings.facts["split"][part] for part in ("train", "validation", "test")]
    assert sorted(name for part in parts for name in part) == [f"task{number}" for number in range(5)]
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "run"), "--json"])
    assert json.loads(capsys.readouterr().out)["protocol"]["ways"] == ways


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "folder:PLACES/own --model mlp --ways 4",
            "'task0' has 3 with the 5 rows that 2 shots + 3 query rows need",
        ),
        ("folder:PLACES/same/task0 --test-keys a", "--test-keys is for a folder TASK/CLASS/IMAGE, and "),
        ("folder:PLACES/same --skip-small-classes", "of tasks take --skip-small-groups"),
        ("folder:PLACES/same --model mlp --test-keys task9", "no task 'task9' here; there are: task"),
    ],
)
def test_folders_of_tasks_are_refused_in_one_line(text, expected, places, tmp_path, capsys):
    given = text.replace("PLACES", str(places)).split()
    assert expected in refused(capsys, ["train", *given, *QUICK.split(), "--out", tmp_path / "run"])
    assert not (tmp_path / "run").exists()
