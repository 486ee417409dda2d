"""Models in which a module is reachable under two names, or a Linear weight goes into another function."""

import pytest
import torch
from torch import nn

from fomaml.engines import meta_gradient
from fomaml.errors import InputError
from fomaml.learning.algorithms import FOMAML
from fomaml.tasks import Examples, Task


class Twice(nn.Module):
    """Its layers as attributes, and once more in a Sequential."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 16, 3), nn.Linear(144, 2)
        self.net = nn.Sequential(self.first, nn.ReLU(), nn.Flatten(), self.head)

    def forward(self, inputs):
        return self.net(inputs)


def again():
    layer = nn.Conv2d(16, 16, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), layer, nn.BatchNorm2d(16), nn.ReLU(), layer, nn.Flatten(), nn.Linear(144, 2)
    )


def draw(*shape, ways=2):
    labels = torch.arange(ways).repeat_interleave(2).expand(3, -1)
    return Task(*(Examples(torch.randn(3, 2 * ways, *shape).double(), labels) for _ in "ab"))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("engine", ["loop", "batched", "auto"])
@pytest.mark.parametrize("make", [Twice, again])
def test_a_module_of_two_names_keeps_its_parameters(make, engine, compile):
    model, tasks = make().double(), draw(1, 5, 5)
    learner = FOMAML(model, 0.5, 2)
    own = {name: (value, value.detach().clone()) for name, value in model.named_parameters()}
    first = meta_gradient(learner, tasks, engine=engine, compile=compile)
    second = meta_gradient(learner, tasks, engine=engine, compile=compile)
    for name, value in model.named_parameters():
        assert value is own[name][0] and torch.equal(value, own[name][1])
    for name, gradient in meta_gradient(FOMAML(model, 0.5, 2), tasks, engine="loop").gradients.items():
        torch.testing.assert_close(first.gradients[name], gradient, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(second.gradients[name], gradient, rtol=1e-9, atol=1e-10)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.gate, self.head = nn.Linear(784, 256), nn.Linear(256, 128), nn.Linear(64, 2)

    def forward(self, inputs):
        hidden = torch.relu(self.wide(inputs))
        left, right = self.gate.weight.chunk(2)
        return self.head((hidden @ left.t()) * torch.sigmoid(hidden @ right.t()))


class Inside(nn.Module):
    """A weight goes through another layer."""

    def __init__(self):
        super().__init__()
        self.wide, self.gate = nn.Linear(784, 256), nn.Linear(784, 2)

    def forward(self, inputs):
        return torch.relu(self.wide(inputs)) @ self.wide(self.gate.weight).t()


@pytest.mark.parametrize("make", [Gated, Inside])
def test_a_weight_in_another_function_is_not_factored(make):
    model, tasks = make().double(), draw(784)
    learner = FOMAML(model, 0.1, 2)
    with pytest.raises(InputError, match=r"'gate\.weight' is used outside of a linear layer"):
        meta_gradient(learner, tasks, engine="factored")
    found = meta_gradient(learner, tasks)
    assert found.engine != "factored"
    for name, gradient in meta_gradient(learner, tasks, engine="loop").gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-9, atol=1e-10)
