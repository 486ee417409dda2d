"""What goes where measurements are told beside metrics.jsonl: the same numbers, once each, whatever was interrupted."""

import json

import numpy as np
import pytest

from commands import refused, without
from fomaml.app import logs, rundir, session
from fomaml.app.cli import main
from fomaml.app.run_record import command, read_record
from fomaml.app.rundir import parsed_line

# validated, so that records of both kinds are written; sinusoids have no validation tasks
WORDS = "--iterations 6 --meta-batch-size 2 --test-tasks 2 --test-steps 0 1 --no-baselines --ways 2 --shots 1"
WORDS += " --shares 0.4 0.3 0.3 --query-shots 2 --channels 4 --checkpoint-every 2"
WORDS += " --validate-every 3 --validation-tasks 2"
OWN = """
import json

class Lines:
    def __init__(self, out, done):
        self.file = open(out / "own.jsonl", "a")
        self.tell({"done": done})

    def tell(self, record):
        self.file.write(json.dumps(record) + "\\n")

    write = tell

    def close(self):
        self.tell("closed")
        self.file.close()

class Failing(Lines):
    def write(self, record):
        raise RuntimeError("the disk is full")

class Half:
    def __init__(self, out, done):
        pass

def function(out, done):
    return None
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def train(images, out, *words):
    main(["train", f"folder:{images}/even", *WORDS.split(), "--out", str(out), *words])


def killed(images, out, monkeypatch, *words, after=3):
    """A run that ends within iteration `after`, as a power cut would end it."""
    real = session.Session._log

    def log(self, **facts):
        if self.done > after:
            raise KeyboardInterrupt
        real(self, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_log", log)
        with pytest.raises(SystemExit):
            train(images, out, *words)


def measurements(out):
    return [parsed_line(line) for line in (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)]


def told(out):
    """Tag → [(iteration, value)] of the event files, as TensorBoard itself reads them."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="event files are TensorBoard's, of the extra tensorboard",
    )
    read = accumulator.EventAccumulator(str(out / "tensorboard"), {accumulator.SCALARS: 0})
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def expected(out):
    found = {}
    for record in measurements(out):
        kind = "validation" if "validation" in record else "training"
        by_steps = {f"after {steps} steps": score for steps, score in record.pop("by_steps", {}).items()}
        for key, value in (record | by_steps).items():
            if key != "iteration":
                tag = f"{kind}/{'score' if key == 'validation' else key}"
                found.setdefault(tag, []).append((record["iteration"], float(np.float32(value))))
    return found


def test_event_files_hold_what_metrics_jsonl_holds(images, tmp_path):
    train(images, tmp_path / "run", "--log", "tensorboard")
    found = told(tmp_path / "run")
    assert found == expected(tmp_path / "run")
    assert len(found["training/meta_loss"]) == 6 and len(found["validation/score"]) == 2
    record = read_record(tmp_path / "run")
    assert record.settings.log == ("tensorboard",) and "--log" not in command(record.settings)


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_resumed_run_goes_on_with_its_log_and_doubles_nothing(after, images, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(logs.TensorBoard, "close", lambda self: None)  # as a power cut closes nothing
        killed(images, out, monkeypatch, "--log", "tensorboard", after=after)
    main(["train", "--resume", str(out)])
    found = told(out)
    assert found == expected(out)
    assert [step for step, _ in found["training/meta_loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["validation/score"]] == [3, 6]


def test_a_log_changes_no_weight(images, tmp_path):
    train(images, tmp_path / "plain")
    train(images, tmp_path / "logged", "--log", "tensorboard")
    weights = [(tmp_path / name / rundir.WEIGHTS).read_bytes() for name in ("plain", "logged")]
    assert weights[0] == weights[1]


def test_a_log_of_ones_own_is_told_each_record(images, own, monkeypatch, capsys):
    killed(images, own / "run", monkeypatch, "--log", "tensorboard", "own.py:Lines")
    done = 3  # the validation of iteration 3 was a checkpoint
    first = [json.loads(line) for line in (own / "run" / "own.jsonl").read_text().splitlines()]
    assert first[0] == {"done": 0} and first[-1] == "closed"
    assert first[1:-1] == measurements(own / "run")
    assert "add --log tensorboard own.py:Lines" in refused(capsys, ["train", "--resume", "run"])
    said = refused(capsys, ["train", "--resume", "run", "--log", "own.py:Lines"])
    assert said == "the run in run has --log tensorboard own.py:Lines, got --log own.py:Lines"
    main(["train", "--resume", "run", "--log", "tensorboard", str(own / "own.py:Lines")])
    second = [json.loads(line) for line in (own / "run" / "own.jsonl").read_text().splitlines()][len(first) :]
    assert second[0] == {"done": done} and second[-1] == "closed"
    assert first[1:-1] + second[1:-1] == measurements(own / "run")
    assert told(own / "run") == expected(own / "run")
    # what judges the run needs no log
    main(["evaluate", "run", "--tasks", "2"])


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("wandb", "unknown log 'wandb'; there are: tensorboard, FILE.py:NAME, package.module:NAME"),
        ("tensorboard tensorboard", "--log has tensorboard twice"),
        ("own.py:None", "own.py has no 'None'"),
        ("none.py:Lines", "there is no file none.py"),
        ("own.py:Half", "the log own.py:Half must have write(record) and close(), got <"),
        ("own.py:function", "the log own.py:function must have write(record) and close(), got None"),
        ("own.py:json", "the log own.py:json must be a class, got <module"),
        ("own.py:Failing", "the log own.py:Failing failed: RuntimeError: the disk is full (own.py, line 20)"),
    ],
)
def test_what_is_no_log_is_one_line(log, words, images, own, capsys):
    arguments = ["train", f"folder:{images}/even", *WORDS.split(), "--out", "run", "--log", *log.split()]
    assert words in refused(capsys, arguments)
    begun = "function" in log or "Failing" in log  # which only a run can tell
    assert (own / "run").exists() == begun
    if begun:
        assert not rundir.is_finished(own / "run")


def test_a_resumed_run_takes_no_other_log(images, own, monkeypatch, capsys):
    killed(images, own / "run", monkeypatch)
    said = refused(capsys, ["train", "--resume", "run", "--log", "tensorboard"])
    assert said == "the run in run has no --log, got --log tensorboard"


def test_without_tensorboard_the_extra_is_named_before_anything_is_written(images, own, monkeypatch, capsys):
    without(monkeypatch, "torch.utils.tensorboard")
    arguments = ["train", f"folder:{images}/even", *WORDS.split(), "--out", "run", "--log", "tensorboard"]
    assert refused(capsys, arguments) == "--log tensorboard needs it: pip install 'fomaml[tensorboard]'"
    assert not (own / "run").exists()
    assert list(logs.LOGS) == ["tensorboard"]
