"""A comparison that is interrupted: what is finished is kept, the rest goes on, and nothing is left running."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fomaml
from fomaml.app import compare
from fomaml.app.cli import main
from fomaml.app.compare_resume import BEGUN, COSTS
from fomaml.sealed import unsealed
from fomaml.train import train

COMPARE = "compare sinusoid --algorithms fomaml anil --iterations 12 --meta-batch-size 2 --test-tasks 4"
MEASURED = ("seconds", "tasks_per_second", "peak_memory_mb", "memory")


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(compare, "isolated", lambda function, *given: function(*given, threads=1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "isolated", lambda function, *given: function(*given, threads=1))
        main([*COMPARE.split(), "--out", str(out)])
    return out


def rows(out):
    result = unsealed((out / "compare.json").read_text(), required=True)
    kept = [{name: value for name, value in row.items() if name not in MEASURED} for row in result["rows"]]
    return kept, result["cosines"], result["command"]


def dying(algorithm, at):
    """The session's `train` that dies after an iteration of one of the algorithms, which are trained in turn."""
    begun = []

    def own(learner, *arguments, **options):
        begun.append(learner)
        for record in train(learner, *arguments, **options):
            yield record
            if record.iteration == at and len(begun) == ["fomaml", "anil"].index(algorithm) + 1:
                raise Killed

    return own


@pytest.mark.parametrize(("algorithm", "at"), [("fomaml", 5), ("anil", 7)])
def test_a_killed_comparison_goes_on_and_ends_the_same(algorithm, at, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "all"
    with monkeypatch.context() as patch:
        patch.setattr("fomaml.app.session.train", dying(algorithm, at))
        with pytest.raises(Killed):
            main([*COMPARE.split(), "--checkpoint-every", "2", "--out", str(out)])
    capsys.readouterr()
    main(["compare", "--resume", str(out)])
    said = capsys.readouterr().out
    assert ("FOMAML (1/2): finished before" in said) == (algorithm == "anil")
    found, expected = rows(out), rows(whole)
    assert found[:2] == expected[:2]
    for name in ("fomaml", "anil"):
        first, second = ((each / name / "weights.safetensors") for each in (out, whole))
        tensors = [fomaml.checkpoint.load_tensors(path)[0] for path in (first, second)]
        assert all(tensors[0][key].equal(tensors[1][key]) for key in tensors[1])
    assert not (out / "fomaml" / "snapshots").exists()


def test_what_cannot_go_on_is_one_line(whole, tmp_path, capsys):
    for folder, options, message in (
        (whole, (), f"the comparison in {whole} is finished; see {whole / 'compare.txt'}"),
        (tmp_path, (), f"{tmp_path} holds no comparison that was begun (no {BEGUN})"),
        (whole, ("--shots", "3"), "--resume takes the options of the comparison: give no others"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["compare", "--resume", str(folder), *options])
        assert stop.value.code == 2 and capsys.readouterr().err == f"fomaml: error: {message}\n"
    shutil.copytree(whole, tmp_path / "own")
    (tmp_path / "own" / "compare.json").unlink()
    text = (tmp_path / "own" / COSTS / "anil.json").read_text()
    (tmp_path / "own" / COSTS / "anil.json").write_text(text.replace('"iterations": 12', '"iterations": 13'))
    with pytest.raises(SystemExit):
        main(["compare", "--resume", str(tmp_path / "own")])
    assert "anil.json is damaged: delete" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(number, tmp_path):
    out = tmp_path / "all"
    command = [sys.executable, "-m", "fomaml", *COMPARE.replace("12", "1000000").split(), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(fomaml.__file__).parents[1])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as own:
        while not (out / "fomaml" / "state.safetensors").exists():
            assert own.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{own.pid}/task/{own.pid}/children").read_text().split()
        own.send_signal(number)
        _, error = own.communicate(timeout=600)
    assert own.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert error.splitlines() == ["fomaml: interrupted", f"resume with: fomaml compare --resume {out}"]
    until = time.monotonic() + 600
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < until:
        time.sleep(0.1)
    assert children and not [child for child in children if Path(f"/proc/{child}").exists()]
