"""What a meta-gradient keeps in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from fomaml.engines.factored import problem as factored_problem
from fomaml.learning.adapt import SGD, Adam
from fomaml.learning.algorithms import FOMAML, MAML, Reptile
from fomaml.learning.problem import Problem
from fomaml.models import MLP
from fomaml.tasks import one
from zoo import draw, example


def live_bytes(compute) -> int:
    """How many bytes the graph of the result of `compute` keeps for its backward pass."""
    live = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal live
            self.tensor = tensor
            live += tensor.nbytes

        def __del__(self):
            nonlocal live
            live -= self.tensor.nbytes

    with saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        result = compute()
    assert result.requires_grad  # and with it its graph, until here
    return live


def saved(preset, engine, steps, module="mlp", **choices):
    model, tasks, criterion = example(module)
    learner = preset(model, 0.01, steps, criterion, **choices)
    stacked = engine == "batched"
    return live_bytes(
        lambda: (
            learner.objective(Problem(learner, tasks if stacked else one(tasks, 0), stacked=stacked)).scalar
        )
    )


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("preset", [FOMAML, Reptile])
@pytest.mark.parametrize("module", ["mlp", "conv4", "user"])
@pytest.mark.parametrize("inner", [SGD(), SGD(momentum=0.9), Adam()], ids=["sgd", "momentum", "adam"])
def test_first_order_keeps_no_inner_graph(engine, preset, module, inner):
    sizes = {s: saved(preset, engine, s, module, optimizer=inner) for s in (1, 10)}
    assert 0 < sizes[10] <= 1.05 * sizes[1]


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_second_order_does_and_the_measure_sees_it(engine):
    assert saved(MAML, engine, 10) > 5 * saved(MAML, engine, 1)
    assert saved(MAML, engine, 1) > 1.5 * saved(FOMAML, engine, 1)


def test_factored_keeps_one_forward_pass_and_the_factors():
    """The saved bytes grow by less than the query's own part: the factors, never whole weights."""
    torch.manual_seed(1)
    model = MLP(256, 256, 4)
    tasks = draw((256,), F.cross_entropy, shots=1).to(dtype=torch.float32)

    def kept(steps):
        learner = FOMAML(model, 0.01, steps)
        problem = factored_problem(learner, tasks)
        return live_bytes(lambda: learner.objective(problem).scalar)

    one_weight = 256 * 256 * 4
    assert kept(5) - kept(1) < 3 * one_weight  # below one built weight per task
