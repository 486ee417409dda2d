"""The operations of a forward pass, which the rule for engines looks at."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fomaml.engines.probes import FEW, flops, work
from fomaml.learning.algorithms import FOMAML
from fomaml.tasks import Examples, Task
from moved_names import gone

LAYER = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
MODELS = {
    "convolutions": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)), (1, 8, 8)),
    "attention": (nn.Sequential(LAYER, nn.Flatten(), nn.Linear(40, 3)), (5, 8)),
    "dense": (nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), (6,)),
}  # fmt: skip


def some_tasks(shape, query=20):
    labels = torch.arange(20) % 3
    return Task(
        Examples(torch.randn(2, 6, *shape), labels[:6].expand(2, 6)),
        Examples(torch.randn(2, query, *shape), labels[:query].expand(2, query)),
    )


@pytest.mark.parametrize("name", MODELS)
def test_they_are_those_that_torch_counts(name):
    model, shape = MODELS[name]
    for query in (3, FEW, 20):
        tasks = some_tasks(shape, query)
        for of_support, part in ((False, tasks.query), (True, tasks.support)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(part.inputs[0])
            assert flops(FOMAML(model, 0.1, 1), tasks, of_support) == counter.get_total_flops() > 0


def test_a_model_that_wants_all_examples_gets_them():
    class Wants(nn.Linear):
        def forward(self, inputs):
            assert len(inputs) in (6, 20)
            return super().forward(inputs)

    assert flops(FOMAML(Wants(4, 3), 0.1, 1), some_tasks((4,))) == 2 * 20 * 4 * 3


def test_what_can_not_be_watched_is_counted_by_torch(monkeypatch):
    model, shape = MODELS["convolutions"]
    learner, tasks = FOMAML(model, 0.1, 1), some_tasks(shape)
    expected, _ = work(learner, tasks)
    gone("torch.utils._python_dispatch:TorchDispatchMode", monkeypatch)
    assert work(learner, tasks) == (expected, 5)


def test_counting_does_not_load_the_compiler_of_torch():
    code = """if True:
        import sys, torch
        from torch import nn
        from fomaml import FOMAML, Examples, Task
        from fomaml.engines.probes import work
        sets = [Examples(torch.randn(2, 4, 1, 8, 8), (torch.arange(4) % 2).expand(2, 4)) for _ in range(2)]
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2))
        assert work(FOMAML(model, 0.1, 1), Task(*sets))[0] > 0
        assert "torch._dynamo" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
