"""What a run asks of its device, and what its result says of it."""

import contextlib
import json
import os

import pytest
import torch

import characters
from elsewhere import Elsewhere
from fomaml import ahead
from fomaml.app import build, device, networks, rundir, together
from fomaml.app.cli import main
from fomaml.app.device import device_facts, reproducible
from fomaml.engines import Plan

RUN = "sinusoid --iterations 1 --meta-batch-size 2 --test-tasks 2 --test-steps 0 1 --no-baselines"


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv(device.WORKSPACE, raising=False)


def test_a_gpu_repeats_its_numbers_within_a_run_and_is_left_as_it_was(plain):
    own = torch.backends.cudnn
    with reproducible("cuda:1"):
        assert (own.deterministic, own.benchmark) == (True, False)
        assert os.environ[device.WORKSPACE] == ":4096:8"
    assert (own.deterministic, own.benchmark) == (False, True)


def test_a_workspace_that_is_set_is_left(plain, monkeypatch):
    monkeypatch.setenv(device.WORKSPACE, ":16:8")
    with reproducible("cuda"):
        assert os.environ[device.WORKSPACE] == ":16:8"


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_nothing_is_set_for_others(name, plain):
    with reproducible(name):
        assert not torch.backends.cudnn.deterministic and device.WORKSPACE not in os.environ


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_what_is_said_of_a_gpu(precision, monkeypatch, plain):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: f"the GPU {name}")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    with reproducible("cuda:0"):
        found = device_facts("cuda:0")
    products = [] if precision == "highest" else ["matrix products"]
    assert found["tf32"] == [*products, *(["convolutions"] if torch.backends.cudnn.allow_tf32 else [])]
    assert found["gpu"].startswith("the GPU cuda:0, CUDA")
    assert found["deterministic"] == {"cudnn": True, "cublas_workspace": ":4096:8"}
    assert device_facts("mps") == {"device": "mps"} and device_facts("cpu") == {}


def test_a_run_is_computed_so_and_its_result_says_it(tmp_path, monkeypatch):
    within, seen = [], []

    @contextlib.contextmanager
    def watched(name):
        within.append(name)
        yield
        within.remove(name)

    call = Plan.__call__
    monkeypatch.setattr(together, "reproducible", watched)
    monkeypatch.setattr(rundir, "device_facts", lambda name: {"gpu": f"of {name}"})
    monkeypatch.setattr(
        Plan, "__call__", lambda self, *given, **told: (seen.append([*within]), call(self, *given, **told))[1]
    )
    main(["train", *RUN.split(), "--out", str(tmp_path / "run")])
    assert seen == [["cpu"]] and not within
    assert json.loads((tmp_path / "run" / "result.json").read_text())["gpu"] == "of cpu"


@pytest.fixture
def on_any_device(monkeypatch):
    """The names of devices are not checked, and tasks are drawn in this thread, as the device that is played is its."""
    monkeypatch.setattr(ahead, "LARGE", 0)
    for module in (build, networks):
        monkeypatch.setattr(module, "check_device", torch.device)


SHORT = "--iterations 3 --meta-batch-size 2 --test-tasks 5 --test-steps 0 1"
KINDS = {
    "regression": "sinusoid",
    "classes, validated and calibrated": "omniglot --ways 3 --channels 4 --query-shots 2 --validate-every 2 "
    "--validation-tasks 5 --augment turns --inner-momentum 0.5",
    "heads of prototypes": "omniglot --ways 3 --channels 4 --query-shots 2 --algorithm proto-maml",
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "regression" else pytest.mark.long) for kind in KINDS]
)
def test_a_run_elsewhere_is_that_of_the_cpu(kind, tmp_path, monkeypatch, capsys, on_any_device):
    characters.shrink(monkeypatch)
    root = characters.write(tmp_path / "data")
    data = ["--data-root", str(root)] if "omniglot" in KINDS[kind] else []
    told = [*KINDS[kind].split(), *data, *SHORT.split()]
    rows, told_then = [], []
    for name in ("cpu", "meta"):
        out = tmp_path / name
        with contextlib.nullcontext() if name == "cpu" else Elsewhere():
            main(["train", *told, "--no-baselines", "--device", name, "--out", str(out)])
            capsys.readouterr()
            main(["evaluate", str(out), "--tasks", "4"])
        told_then.append(capsys.readouterr().out)
        rows.append(json.loads((out / "result.json").read_text())["rows"])
    assert _near(*rows) and told_then[0] == told_then[1]


def _near(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_near(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_near, one, other))
    return one == (pytest.approx(other, rel=1e-4) if isinstance(one, float) else other)
