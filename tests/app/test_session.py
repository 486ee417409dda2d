"""One training loop: `fomaml compare` and `fomaml train` write the same run, every option included."""

import json
import subprocess

import pytest

import characters
from fomaml.app import build, rundir, session
from fomaml.app.cli import main
from fomaml.app.settle import settle
from moments import Ticking

SINUSOID = "sinusoid --iterations 6 --meta-batch-size 2 --test-tasks 5 --test-steps 0 1 --no-baselines"
SHORT = (
    "--iterations 4 --meta-batch-size 2 --ways 3 --channels 4 --query-shots 2 --test-tasks 4 --test-steps 0 1"
)


def in_this_process(function, *arguments):
    return function(*arguments, threads=1)


def same(train, compare):
    names = sorted(path.name for path in train.iterdir())
    assert names == sorted(path.name for path in compare.iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            assert (train / name).read_bytes() == (compare / name).read_bytes(), name
    one, other = (json.loads((out / "result.json").read_text()) for out in (train, compare))
    assert one["rows"] == other["rows"] and one["weights"] == other["weights"]


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--clip 0.01 --schedule linear --weight-decay 0.1",
        "--learn-rates per-step --engine batched --tasks-at-once 1",
        "--inner-batch-size 5 --test-inner-batch-size 3 --inner-momentum 0.5 --seed 3",
    ],
)
def test_compare_trains_what_train_trains(options, tmp_path, monkeypatch):
    if options:  # processes of their own once: torch takes seconds to import
        monkeypatch.setattr("fomaml.app.compare.isolated", in_this_process)
    arguments = f"{SINUSOID} {options}".split()
    main(["compare", *arguments, "--algorithms", "anil", "--out", str(tmp_path / "compared")])
    for algorithm in ("fomaml", "anil"):
        out = tmp_path / algorithm
        main(["train", *arguments, "--algorithm", algorithm, "--out", str(out)])
        same(out, tmp_path / "compared" / algorithm)


def test_compare_validates_as_train_does(tmp_path, monkeypatch):
    """In this process: the characters are fewer than the archives have."""
    characters.shrink(monkeypatch)
    monkeypatch.setattr("fomaml.app.compare.isolated", in_this_process)
    root = characters.write(tmp_path / "data")
    base = ["omniglot", "--data-root", str(root), *SHORT.split(), "--no-baselines", "--validate-every", "2"]
    base += ["--validation-tasks", "5", "--patience", "1"]
    main(["compare", *base, "--algorithms", "fomaml", "--out", str(tmp_path / "compared")])
    main(["train", *base, "--out", str(tmp_path / "trained")])
    same(tmp_path / "trained", tmp_path / "compared" / "fomaml")


def test_a_run_by_seconds_says_that_it_cannot_be_repeated(tmp_path, capsys, monkeypatch):
    Ticking(monkeypatch)
    out = tmp_path / "run"
    base = ["sinusoid", "--seconds", "0.2", "--test-tasks", "4", "--test-steps", "0", "1", "--no-baselines"]
    main(["train", *base, "--out", str(out)])
    assert "training for 0.2 s, which cannot be repeated bit for bit" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["training_seconds"] == 0.2 and 200 <= result["iterations"] <= 201  # of a thousandth each
    assert json.loads((out / "config.json").read_text())["seconds"] == 0.2


def test_memory_that_has_run_out_is_remembered_by_a_resumed_run(tmp_path, capsys, monkeypatch):
    """From the checkpoint on as few tasks are computed at once as had fitted into memory."""
    made = []

    class Killed(BaseException):
        pass

    def watch(record, seconds):
        if record.iteration == 2:
            made[-1].choice = made[-1].choice._replace(tasks_at_once=1)  # as after an error of memory
        if record.iteration == 5:
            raise Killed

    def noted(*arguments, **options):
        made.append(plan(*arguments, **options))
        return made[-1]

    plan = build.plan
    monkeypatch.setattr(build, "plan", noted)
    base = {
        "source": "sinusoid",
        "iterations": 8,
        "meta_batch_size": 4,
        "checkpoint_every": 4,
        "test_tasks": 4,
    }
    settings = settle(**base, engine="batched", test_steps=(0, 1))
    with pytest.raises(Killed):
        session.train_run(settings, tmp_path / "run", say=lambda line: None, watch=watch)
    session.train_run(settings, tmp_path / "run", say=lambda line: None, resume=True)
    assert [each.tasks_at_once for each in made] == [1, 4, 1]


def test_a_run_by_seconds_is_validated_where_it_ends_also_when_killed_there(tmp_path, monkeypatch):
    """Its time is over at its last checkpoint, and it was not validated yet."""
    Ticking(monkeypatch)
    characters.shrink(monkeypatch)
    root = characters.write(tmp_path / "data")
    base = {"source": "omniglot", "data_root": root, "channels": (4,), "ways": 3, "query_shots": 2}
    counts = {"meta_batch_size": 2, "validation_tasks": 5, "test_tasks": 4, "test_steps": (0, 1)}
    often = {"seconds": 0.01, "validate_every": 1000, "checkpoint_every": 1, "baselines": False}
    settings = settle(**base, **counts, **often)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(session, "validate", die)
        with pytest.raises(Killed):
            session.train_run(settings, tmp_path / "run", say=lambda line: None)
    result = session.train_run(settings, tmp_path / "run", say=lambda line: None, resume=True)
    assert result["weights"]["iteration"] == result["iterations"] and 10 <= result["iterations"] <= 11


def test_the_commit_is_that_of_this_project_alone(tmp_path):
    """An environment inside of another repository: its commit says nothing of what is installed there."""
    package = tmp_path / "environment" / "src" / "fomaml"
    package.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    assert rundir.commit(package) is None
    own = tmp_path / "src" / "fomaml"
    own.mkdir(parents=True)
    head = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True, check=True)
    assert rundir.commit(own) == head.stdout.strip()
