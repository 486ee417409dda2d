"""Runs with --compile auto: what was decided is recorded, and a run that goes on keeps to it."""

import dataclasses
import json
import signal

import pytest

from compiling import inductor
from fomaml.app import session
from fomaml.app.cli import main
from fomaml.app.settings import from_json, identity, to_json
from fomaml.app.settle import settle
from fomaml.checkpoint import load_progress, load_tensors
from fomaml.engines import pays
from fomaml.engines.compiled.cache import too_old
from fomaml.engines.cpu import build
from moments import sending

pytestmark = pytest.mark.skipif(bool(too_old()), reason=too_old())

TRAIN = "train sinusoid --iterations 8 --meta-batch-size 2 --test-tasks 4 --test-steps 0 1 --no-baselines"
CHECKED = "compiled, and agrees with the eager engine"
FAILED = "cannot be compiled"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Compiling pays from 4 iterations on, takes no time, and rounds otherwise than the eager engine does."""

    def compile(graph, *arguments):
        return lambda *inputs: [1.00001 * tensor for tensor in graph(*inputs)]

    monkeypatch.setattr(pays, "cost", lambda *_: pays.Cost(1.0, 1.0, 2.0))
    inductor(monkeypatch, compile)


def breaks(patch):
    inductor(patch, lambda *_: (_ for _ in ()).throw(RuntimeError(FAILED)))


def run(out, *options, killed=0, monkeypatch=None):
    """Train, and stop after an iteration; the weights, where the run came to its end."""
    arguments = (
        ["train", "--resume", str(out), *options]
        if out.exists()
        else [*TRAIN.split(), "--out", str(out), *options]
    )
    if not killed:
        main(arguments)
        return {
            name: tensor.tolist() for name, tensor in load_tensors(out / "weights.safetensors")[0].items()
        }
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(session, "train", sending(session.train, signal.SIGTERM, killed))
        main(arguments)
    return None


def result(out):
    return json.loads((out / "result.json").read_text())


def kept(out):
    return load_progress(out / "state.safetensors")["compile"]


def test_a_killed_run_ends_with_the_same_weights(tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole")
    assert result(tmp_path / "whole")["compile"] == CHECKED
    assert "compiling pays from 4 iterations on, of 8" in capsys.readouterr().out
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["compile"] == "auto"
    assert whole != run(tmp_path / "eager", "--compile", "no")  # so that the bits tell
    assert result(tmp_path / "eager")["compile"] == "uncompiled"
    assert whole == run(tmp_path / "asked", "--compile", "yes")
    own = tmp_path / "run"
    run(own, killed=3, monkeypatch=monkeypatch)
    assert kept(own) == {"asked": "auto", "decided": True, "told": CHECKED}
    monkeypatch.setattr(pays, "cost", lambda *_: pays.Cost(1.0, 1.0, 1000.0))  # what it had decided counts
    assert run(own) == whole


def test_a_run_that_was_not_compiled_is_not_compiled_later(tmp_path, monkeypatch, capsys):
    own = tmp_path / "run"
    with monkeypatch.context() as patch:
        breaks(patch)
        run(own, killed=3, monkeypatch=monkeypatch)
    assert kept(own) == {"asked": "auto", "decided": False, "told": f"uncompiled: {FAILED}"}
    assert "Warning" not in capsys.readouterr().err
    assert run(own) == run(tmp_path / "eager", "--compile", "no")


@pytest.mark.parametrize("asked", ["auto", "yes"])
def test_what_was_compiled_and_cannot_be_stops_unless_told_otherwise(asked, tmp_path, monkeypatch, capsys):
    own = tmp_path / "run"
    run(own, "--compile", asked, killed=3, monkeypatch=monkeypatch)
    breaks(monkeypatch)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(own)
    said = capsys.readouterr().err
    assert f"this run was compiled, and cannot be here: {FAILED}; --compile no goes on uncompiled" in said
    assert said.count("\n") <= 2 and "Traceback" not in said
    run(own, "--compile", "no", killed=5, monkeypatch=monkeypatch)
    assert kept(own) == {"asked": "no", "decided": False, "told": "uncompiled"}
    run(own)
    [change] = result(own)["changed"]
    assert change == {"iteration": 3, "setting": "compile", "from": asked, "to": "no"}
    assert result(own)["compile"] == "uncompiled"


def test_a_machine_without_a_compiler_runs_uncompiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "compiler", list)
    run(tmp_path / "run")
    said = capsys.readouterr()
    assert "not compiled: there is no C++ compiler on this machine" in said.out and "Warning" not in said.err
    assert result(tmp_path / "run")["compile"] == "uncompiled"


def test_a_run_of_an_earlier_version_is_as_it_says(tmp_path, monkeypatch):
    """compile was true or false; its files carry a digest of that."""
    for asked, before in (("yes", True), ("no", False)):
        settings = settle(source="sinusoid", compile=asked)
        assert settings == settle(source="sinusoid", compile=before)
        assert identity(settings)["compile"] is before
        first = json.loads(to_json(dataclasses.replace(settings, format=1)))
        text = json.dumps(first | {"compile": before})
        found = from_json(text, "config.json")
        assert found.compile == asked and identity(found)["compile"] is before
    own = tmp_path / "run"
    run(own, "--compile", "yes", killed=3, monkeypatch=monkeypatch)
    real = session.planned.going_on
    monkeypatch.setattr(  # a state that holds nothing of it
        session.planned,
        "going_on",
        lambda *given: real(*given[:4], {k: v for k, v in given[4].items() if k != "compile"}),
    )
    run(own)
    assert result(own)["compile"] == CHECKED


def test_seconds_count_as_the_iterations_that_the_rule_takes_them_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pays, "cost", lambda *_: pays.Cost(0.1, 0.01, 1.0))  # pays from 200 on
    for seconds, compiled in ((0.5, False), (21, True)):
        settings = settle(source="sinusoid", seconds=seconds, meta_batch_size=2, test_tasks=4)
        with session.session(settings, tmp_path / str(seconds), say=print) as own:
            assert own.plan.compile is compiled
