"""Compiled graphs to look into, learners of every compiled kind, two threads, and an empty cache of kernels."""

import tempfile

import pytest
import torch

from compiling import GRAPHS, untouched
from convolutions import convolutional
from family import LR
from fomaml.engines.compiled import trace
from fomaml.engines.cpu import build
from fomaml.learning.algorithms import FOMAML
from zoo import example


@pytest.fixture(autouse=True)
def graphs_are_kept(monkeypatch):
    """What is compiled does not keep them."""

    def forward(graph):
        run = graph_forward(graph)
        GRAPHS[run] = graph
        return run

    graph_forward = trace._forward
    monkeypatch.setattr(trace, "_forward", forward)


@pytest.fixture(params=["loop", "batched"])
def any_kind(request, monkeypatch):
    """A learner that runs fused, or one that goes to the inductor, here replaced; with its tasks and engine."""
    untouched(monkeypatch)
    if request.param == "loop":
        model, tasks, _ = convolutional("batch-norm")
    else:
        model, tasks, _ = example("mlp")
    return FOMAML(model, LR, 2), tasks, {"engine": request.param}


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """No kernels loaded and none in the cache, which is a temporary folder; so is the folder of temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    build._loaded.clear()
    build._begun.clear()
    yield tmp_path
    build._begun.clear()
    build._loaded.clear()
