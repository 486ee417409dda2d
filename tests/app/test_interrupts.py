"""A run that is asked to stop: the step at hand is finished, nothing is lost, and it says how to go on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fomaml
from fomaml.app import session
from fomaml.app.cli import main
from fomaml.app.interrupts import SIGNALS, Stopped, listening
from fomaml.app.rundir import parsed_line
from moments import sending

TRAIN = "train sinusoid --iterations 30 --meta-batch-size 2 --test-tasks 4 --test-steps 0 1 --no-baselines"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that no signal reached."""
    out = tmp_path_factory.mktemp("whole") / "run"
    main([*TRAIN.split(), "--out", str(out)])
    return out


@pytest.mark.parametrize("number", SIGNALS)
def test_the_step_is_finished_and_saved(number, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    before = [signal.getsignal(own) for own in SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(session, "train", sending(session.train, number, 17))
        with pytest.raises(SystemExit) as stop:
            main([*TRAIN.split(), "--checkpoint-every", "10", "--out", str(out)])
    assert stop.value.code == 128 + number
    said = capsys.readouterr()
    assert said.err == f"fomaml: interrupted\nresume with: fomaml train --resume {out}\n"
    assert [signal.getsignal(own) for own in SIGNALS] == before
    main(["train", "--resume", str(out)])
    assert "resuming after iteration 17 of 30" in capsys.readouterr().out  # not after 10
    for name in ("weights.safetensors", "metrics.jsonl"):
        lines = [(run / name).read_bytes() for run in (whole, out)]
        if name == "metrics.jsonl":
            lines = [
                [{**parsed_line(line), "seconds": 0} for line in own.splitlines(keepends=True)]
                for own in lines
            ]
        else:
            lines = [fomaml.checkpoint.load_tensors(run / name)[0] for run in (whole, out)]
            lines = [{key: value.tolist() for key, value in own.items()} for own in lines]
        assert lines[0] == lines[1]


def test_the_second_one_stops_at_once():
    with listening() as interrupts, interrupts.finishing():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked == signal.SIGINT
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
    with listening() as interrupts, pytest.raises(Stopped):  # where no step is to be finished
        os.kill(os.getpid(), signal.SIGTERM)


def test_another_thread_is_left_alone():
    found = []

    def run():
        with listening() as interrupts:
            found.append(interrupts.asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]


def test_ctrl_c_in_a_shell(tmp_path):
    """As the terminal sends it, to a process of its own, at a moment of its training."""
    command = [sys.executable, "-m", "fomaml", *TRAIN.replace("30", "100000").split(), "--compile", "no"]
    command += ["--checkpoint-every", "5", "--out", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(Path(fomaml.__file__).parents[1])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as own:
        while not (tmp_path / "run" / "state.safetensors").exists():
            assert own.poll() is None
            time.sleep(0.05)
        own.send_signal(signal.SIGINT)
        _, error = own.communicate(timeout=600)
    assert (own.returncode, error.count("\n")) == (130, 2) and "Traceback" not in error
