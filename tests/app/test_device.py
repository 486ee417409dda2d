"""What a run asks of its device, and what its result says of it."""

import contextlib
import json
import os

import pytest
import torch

from fomaml.app import device, rundir, together
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
