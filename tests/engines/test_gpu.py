"""The rule for devices that are not the CPU, on one that is played, see elsewhere.py."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elsewhere import Elsewhere
from fomaml.engines import gpu, plan
from fomaml.engines.probes import work
from fomaml.learning.algorithms import FOMAML, MAML
from fomaml.tasks import Examples, Task

CONV = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
MLP = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 3))
WIDE = nn.Sequential(nn.Flatten(), nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 3))


def some_tasks(number: int = 6) -> Task:
    labels = (torch.arange(6) % 3).expand(number, 6)
    return Task(*(Examples(torch.randn(number, 6, 1, 8, 8), labels) for _ in range(2)))


def planned(model, tasks, **told):
    with Elsewhere() as machine:
        return plan(FOMAML(copy.deepcopy(model).to(machine.device), 0.1, 1), tasks.to(machine.device), **told)


@pytest.mark.parametrize(
    ("model", "share"), [(CONV, gpu.SHARE_OF_CONVOLUTIONS), (MLP, gpu.SHARE_OF_PRODUCTS)]
)
def test_tasks_are_stacked_where_launches_take_longer_than_what_they_compute(model, share, monkeypatch):
    tasks = some_tasks()
    operations, launches = work(FOMAML(model, 0.1, 1), tasks)
    assert operations > 1000 and 3 < launches < 30
    # F = e·P·L·t at this peak
    edge = operations / (share * launches * gpu.LAUNCH[False])
    for peak, engine in ((1.01 * edge, "batched"), (0.99 * edge, "loop")):
        monkeypatch.setattr(gpu, "PEAK", {"cuda": peak})
        own = planned(model, tasks)
        assert own.engine == engine and own.tasks_at_once == (
            1 if engine == "loop" else min(6, math.ceil(1.01 / share))
        )


@pytest.mark.parametrize("number", [1, 2, 4, 6, 100])
def test_as_many_tasks_at_once_as_hide_the_launches(number, monkeypatch):
    tasks = some_tasks()
    operations, launches = work(FOMAML(MLP, 0.1, 1), tasks)
    monkeypatch.setattr(gpu, "PEAK", {"cuda": (number - 0.5) * operations / (launches * gpu.LAUNCH[False])})
    assert planned(MLP, tasks, engine="batched").tasks_at_once == min(number, 6)
    assert planned(MLP, tasks, engine="batched", tasks_at_once=3).tasks_at_once == 3


def test_what_is_replayed_has_shorter_launches():
    learner = FOMAML(MLP, 0.1, 1)
    eager, compiled = (gpu.hidden(learner, some_tasks(), compile) for compile in (False, True))
    assert eager == pytest.approx(compiled * gpu.LAUNCH[False] / gpu.LAUNCH[True])


def test_the_factored_engine_needs_millions(monkeypatch):
    tasks = some_tasks()
    assert plan(FOMAML(WIDE, 0.1, 1), tasks).engine == "factored"  # of a CPU 20 000 are enough
    assert planned(WIDE, tasks).engine == "batched"
    monkeypatch.setattr(gpu, "FACTORED", 6 * 400 * 64 - 1)
    own = planned(WIDE, tasks)
    assert own.engine == "factored" and own.tasks_at_once == 6 and "153600" not in own.why
    monkeypatch.setattr(gpu, "FACTORED", 6 * (400 * 64 + 400 * 3))
    assert planned(WIDE, tasks).engine == "batched"


def test_what_vmap_does_not_take_is_taken_one_by_one():
    class ByValues(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 3)

        def forward(self, inputs):
            found = self.layer(inputs.flatten(1))
            return found if found.sum() < 1e9 else -found

    assert planned(ByValues(), some_tasks()).engine == "loop"


def test_second_order_is_stacked_too():
    with Elsewhere() as machine:
        learner = MAML(copy.deepcopy(MLP).to(machine.device), 0.1, 1, F.cross_entropy)
        assert plan(learner, some_tasks().to(machine.device)).engine == "batched"
