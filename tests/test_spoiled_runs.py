"""What becomes of a run of which a file is damaged: the damage is noticed, or it changes nothing."""

import contextlib
import io
import random
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fomaml.app import session
from fomaml.app.cli import main
from spoiling import spoiled

TRAIN = (
    "train sinusoid --iterations 4 --checkpoint-every 1 --meta-batch-size 2 --test-tasks 3 --test-steps 0 1 "
    "--no-baselines"
)
# What is done with a file of a finished run.
USES = {
    "config.json": ("evaluate RUN --tasks 2", "show RUN"),
    "metrics.jsonl": ("show RUN",),
    "result.json": ("show RUN",),
    "result.txt": ("show RUN",),
    "weights.safetensors": ("evaluate RUN --tasks 2",),
}
CASES = [(name, use) for name, uses in USES.items() for use in uses]
OF_A_STOPPED_ONE = ("config.json", "metrics.jsonl", "state.safetensors", "before.safetensors")
of_seeds = settings(
    max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
)


def said(words):
    """(exit status, what stands on standard output, on standard error) of a command."""
    out, error, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main(words)
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), error.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run and one that was stopped after its third iteration."""
    folder = tmp_path_factory.mktemp("runs")
    assert said([*TRAIN.split(), "--out", str(folder / "whole")])[0] == 0
    real = session.train

    def stopping(*arguments, **options):
        for record in real(*arguments, **options):
            yield record
            if record.iteration == 3:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "train", stopping)
        assert said([*TRAIN.split(), "--out", str(folder / "stopped")])[0] == 130
    return folder


def spoilt(folder, name, seed):
    """A copy of a run with one file changed at random."""
    own = folder.parent / "own"
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(folder, own)
    (own / name).write_bytes(spoiled((own / name).read_bytes(), random.Random(f"{name} {seed}")))
    return own


@pytest.mark.parametrize(("name", "use"), CASES)
def test_a_spoiled_file_is_noticed_or_harmless(runs, name, use):
    expected = said(use.replace("RUN", str(runs / "whole")).split())
    assert expected[0] == 0

    @of_seeds
    @given(st.integers(0, 2**32))
    def holds(seed):
        own = spoilt(runs / "whole", name, seed)
        status, out, error = said(use.replace("RUN", str(own)).split())
        assert (status, out) == expected[:2] or (status == 2 and error.count("\n") == 1)

    holds()


@pytest.mark.parametrize("name", OF_A_STOPPED_ONE)
def test_a_spoiled_stopped_run_ends_the_same_or_not_at_all(runs, name):
    @of_seeds
    @given(st.integers(0, 2**32))
    def holds(seed):
        own = spoilt(runs / "stopped", name, seed)
        status, _, error = said(["train", "--resume", str(own)])
        assert status == 0 or (status == 2 and error.count("\n") == 1)
        if status == 0:
            for file in ("weights.safetensors", "result.txt"):
                assert (own / file).read_bytes() == (runs / "whole" / file).read_bytes(), file

    holds()


@pytest.mark.parametrize("name", ["state.safetensors", "metrics.jsonl", "before.safetensors"])
def test_what_is_lost_is_told(runs, name):
    own = spoilt(runs / "stopped", name, 0)
    (own / name).write_bytes((runs / "stopped" / name).read_bytes()[:-200])
    status, out, _ = said(["train", "--resume", str(own)])
    told = {
        "state.safetensors": f"{own / name} is damaged",
        "metrics.jsonl": f"{own / name}: 2 lines are damaged or gone, and left out",
    }
    assert status == 0 and told.get(name, "resuming after iteration 3 of 4") in out
    assert ("going on from the state before it" in out) == (name == "state.safetensors")
