"""Launches recorded by hand and replayed, played on the CPU: a graph runs again on the memory that it knows."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compiling import assert_close
from fomaml.engines import _torch, adapt, curve, meta_gradient, plan
from fomaml.engines.compiled import replay, trace
from fomaml.learning.algorithms import FOMAML
from fomaml.tasks import Examples, Task, one


class Graph(TorchDispatchMode):
    """Remembers each operator with its tensors, and runs them again into the same ones."""

    made: list = []  # noqa: RUF012 - one list, emptied by the fixture

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0
        Graph.made.append(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, found))
        return found

    def forget(self):
        """On a device nothing is computed while it is recorded."""
        for function, _, _, found in self.calls:
            for each in tree_leaves(found):
                if not self._is_view(function) and each.is_floating_point():
                    each.fill_(torch.nan)

    def replay(self):
        self.replays += 1
        for function, args, kwargs, found in self.calls:
            for place, each in zip(tree_leaves(found), tree_leaves(function(*args, **kwargs)), strict=True):
                if not self._is_view(function):
                    place.copy_(each)

    @staticmethod
    def _is_view(function):
        return any(each.alias_info is not None for each in function._schema.returns)


class Stream:
    def __init__(self, device=None):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


@pytest.fixture
def graphs(monkeypatch):
    """As on CUDA without Triton. Returns the graphs."""

    @contextmanager
    def recorded(graph, pool):
        assert pool == "pool"
        with graph:
            yield
        graph.forget()

    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(trace, "device_of", lambda tasks: torch.device("cuda"))
    monkeypatch.setattr(_torch, "has_triton", lambda: False)
    monkeypatch.setattr(replay, "_pool", lambda device: "pool")
    for name, value in {
        "CUDAGraph": Graph, "graph": recorded, "Stream": Stream, "current_stream": Stream,
        "stream": lambda stream: nullcontext(), "device": lambda device: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return Graph.made


def tasks(seed=0, number=4):
    labels = (torch.arange(6) % 3).expand(number, 6)
    draw = torch.Generator().manual_seed(seed)
    return Task(*(Examples(torch.randn(number, 6, 4, generator=draw), labels) for _ in range(2)))


def learner():
    torch.manual_seed(0)
    return FOMAML(nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)), 0.3, 2)


def assert_right(found, own, batch):
    expected = meta_gradient(own, batch, engine="loop")
    assert_close(found, expected, 1e-5)
    torch.testing.assert_close(found.query_losses, expected.query_losses)
    torch.testing.assert_close(found.query_outputs, expected.query_outputs)


def test_a_meta_gradient_is_recorded_once_and_outlives_the_next(graphs):
    own = learner()
    planned = plan(own, tasks(), engine="batched", tasks_at_once=2, compile=True)
    found = planned(tasks())
    [graph] = graphs
    before = graph.replays
    again = planned(tasks(1))
    assert len(graphs) == 1 and graph.replays == before + 2
    assert_right(found, own, tasks())
    assert_right(again, own, tasks(1))


def test_it_reads_parameters_where_they_lie(graphs):
    own = learner()
    planned = plan(own, tasks(), engine="batched", compile=True)
    first = planned(tasks())
    with torch.no_grad():
        for parameter in own.model.parameters():
            parameter.sub_(0.1)
    assert_right(planned(tasks()), own, tasks())
    assert len(graphs) == 1
    with torch.no_grad():
        own.model[0].weight.data = own.model[0].weight + 0.2
    assert_right(planned(tasks()), own, tasks())
    assert len(graphs) == 2
    assert not torch.allclose(first.query_losses, planned(tasks()).query_losses, rtol=1e-3)


def test_evaluation_and_adapting(graphs):
    own = learner()
    for seed in (0, 1):
        points = [0, 1, 3]
        found = curve(own, tasks(seed), points, compile=True)
        expected = curve(own, tasks(seed), points, compile=False)
        for (losses, outputs), (right, right_outputs) in zip(found, expected, strict=True):
            torch.testing.assert_close(losses, right)
            torch.testing.assert_close(outputs, right_outputs)
        support = one(tasks(seed), 0).support
        adapted = dict(adapt(own, support, compile=True).named_parameters())
        for name, value in own.adapt(support).named_parameters():
            torch.testing.assert_close(adapted[name], value)
    assert graphs and all(graph.replays > 1 for graph in graphs)


def test_with_triton_it_is_left_to_the_compiler(graphs, monkeypatch):
    monkeypatch.setattr(_torch, "has_triton", lambda: True)
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    assert_right(meta_gradient(own := learner(), tasks(), engine="batched", compile=True), own, tasks())
    assert not graphs


def test_what_cannot_be_recorded_runs_uncompiled(graphs, monkeypatch):
    def fails(*given, **named):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    own = learner()
    with pytest.warns(RuntimeWarning, match="runs uncompiled: operation not permitted when stream is"):
        found = meta_gradient(own, tasks(), engine="batched", compile=True)
    assert_right(found, own, tasks())


def test_what_reads_memory_of_before_is_not_trusted(graphs, monkeypatch):
    """A graph that does not see the tasks of a call."""
    real = replay.Replayed._record

    def stale(self, state, examples, places):
        recorded = real(self, state, examples, places)
        return recorded._replace(given=[each.clone() for each in recorded.given])

    monkeypatch.setattr(replay.Replayed, "_record", stale)
    own = learner()
    with pytest.warns(RuntimeWarning, match="runs uncompiled: what was compiled is off"):
        found = meta_gradient(own, tasks(), engine="batched", compile=True)
    assert_right(found, own, tasks())
