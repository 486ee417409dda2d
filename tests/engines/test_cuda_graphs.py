"""Launches that a GPU replays, played on the CPU: what is compiled writes its outputs to the same memory each time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiling import assert_close
from fomaml.engines import _torch, meta_gradient, plan
from fomaml.engines.compiled import trace
from fomaml.learning.algorithms import FOMAML
from fomaml.tasks import Examples, Task


@pytest.fixture
def replayed(monkeypatch):
    """As on CUDA. Returns the options that the backend got, the marks of steps, and the calls."""
    options, marks, calls = [], [], []

    def compile(graph, inputs, given):
        options.append(given)
        kept = []

        def run(*arguments):
            assert len(marks) == len(calls) + 1, "a step is marked before each call"
            calls.append(len(arguments))
            found = graph(*arguments)
            if not kept:
                kept.extend(torch.empty_like(each) for each in found)
            for place, each in zip(kept, found, strict=True):
                place.copy_(each)
            return kept

        return run

    monkeypatch.setattr(_torch, "has_triton", lambda: True)
    monkeypatch.setattr(torch._inductor, "compile", compile)
    monkeypatch.setattr(trace, "device_of", lambda tasks: torch.device("cuda"))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    return options, marks, calls


def test_what_one_call_finds_outlives_the_next(replayed):
    options, marks, calls = replayed
    torch.manual_seed(0)
    learner = FOMAML(nn.Linear(4, 3), 0.1, 2)
    labels = (torch.arange(6) % 3).expand(6, 6)
    tasks = Task(*(Examples(torch.randn(6, 6, 4), labels) for _ in range(2)))
    own = plan(learner, tasks, engine="batched", tasks_at_once=2, compile=True)
    found, again = own(tasks), own(tasks)
    expected = meta_gradient(learner, tasks, engine="loop")
    assert options == [{"triton.cudagraphs": True}]
    # warmed up and recorded, then compared, then three chunks each
    assert len(calls) == len(marks) == 2 + 1 + 3 + 3
    for each in (found, again):
        assert_close(each, expected, 1e-5)
        torch.testing.assert_close(each.query_losses, expected.query_losses)
        torch.testing.assert_close(each.query_outputs, expected.query_outputs)


def test_what_is_not_replayed_right_is_not_trusted(replayed, monkeypatch):
    """It is compared as it runs for good: after it was recorded, and not in the call that warms it up."""
    real = torch._inductor.compile

    def stuck(graph, inputs, given):
        run, first = real(graph, inputs, given), []

        def replay(*arguments):
            found = run(*arguments)
            first.append([each.clone() for each in found])
            return [each * 2 for each in found] if len(first) > 2 else found

        return replay

    monkeypatch.setattr(torch._inductor, "compile", stuck)
    labels = (torch.arange(6) % 3).expand(2, 6)
    tasks = Task(*(Examples(torch.randn(2, 6, 4), labels) for _ in range(2)))
    learner = FOMAML(nn.Linear(4, 3), 0.1, 2, F.cross_entropy)
    with pytest.warns(RuntimeWarning, match="runs uncompiled: what was compiled is off"):
        found = meta_gradient(learner, tasks, engine="batched", compile=True)
    assert_close(found, meta_gradient(learner, tasks, engine="loop"), 1e-5)
