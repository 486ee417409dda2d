"""The second inner step of a task and those after it leave out what the first has looked at: the same numbers."""

from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomaml import FOMAML
from fomaml.errors import InputError
from fomaml.learning.problem import Problem
from fomaml.models import BatchNorm
from fomaml.tasks import Examples, Task


def support(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return Examples(torch.randn(6, 4, generator=generator, dtype=dtype), torch.arange(6) % 3)


class Writing(nn.Module):
    """Its forward pass writes into itself and into a layer, which is of one step."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.layer.times = 0

    def forward(self, inputs):
        self.layer.times += 1
        return self.head(torch.relu(self.layer(inputs)) * self.layer.times)


MODULES = {
    "dense": lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3)),
    "torch's batch norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
    "running": lambda: nn.Sequential(nn.Linear(4, 5), BatchNorm(5, policy="running"), nn.Linear(5, 3)),
    "per step": lambda: nn.Sequential(nn.Linear(4, 5), BatchNorm(5, policy="per-step", steps=4), nn.Linear(5, 3)),
    "of the user's": Writing,
    "an empty part": lambda: nn.Sequential(nn.Sequential(), nn.Linear(4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("criterion", [F.cross_entropy, lambda o, t: F.cross_entropy(o, t)])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:.*statistics that nothing has ever moved")
def test_an_adapted_module_is_that_of_the_whole_steps(name, criterion):
    torch.manual_seed(0)
    learner = FOMAML(MODULES[name]().double(), 0.3, 4, criterion)
    given = support(torch.float64)
    problem = Problem(learner, Task(given, given), evaluating=True)
    for expected, _ in islice(problem.path(first_order=True), 4):
        pass
    adapted = learner.adapt(given)
    found = dict(adapted.named_parameters())
    for key, value in expected.items():
        torch.testing.assert_close(found[key].data, value.detach(), rtol=1e-12, atol=1e-12)
    for key, value in adapted.named_buffers():
        torch.testing.assert_close(value, problem.buffers[key], rtol=1e-12, atol=1e-12)


def test_a_parameter_that_is_used_from_the_second_step_on_moves_from_there():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, inputs):
            calls.append(1)
            return self.first(inputs) + (self.second(inputs) if len(calls) > 1 else 0)

    calls: list[int] = []
    torch.manual_seed(0)
    model = Late()
    learner = FOMAML(model, 0.3, 4)
    adapted = learner.adapt(support())
    by_hand = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    for step in range(4):
        inputs, targets = support()
        outputs = F.linear(inputs, by_hand["first.weight"], by_hand["first.bias"])
        if step:
            outputs = outputs + F.linear(inputs, by_hand["second.weight"], by_hand["second.bias"])
        own = {n: p for n, p in by_hand.items() if step or n.startswith("first")}
        slopes = torch.autograd.grad(F.cross_entropy(outputs, targets), list(own.values()))
        for (name, value), slope in zip(own.items(), slopes):
            by_hand[name] = (value - 0.3 * slope).detach().requires_grad_()
    for name, value in adapted.named_parameters():
        torch.testing.assert_close(value, by_hand[name])


@pytest.mark.parametrize("criterion", [F.mse_loss, lambda o, t: F.mse_loss(o, t)], ids=["torch's", "own"])
@pytest.mark.parametrize("fails", ["raises", "another shape"])
def test_a_later_step_that_fails_leaves_the_module_as_it_was(fails, criterion):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, inputs):
            calls.append(model.layer.weight)
            if len(calls) == 3 and fails == "raises":
                raise ArithmeticError("the third")
            found = self.layer(inputs)
            return found.squeeze(1) if len(calls) < 3 else found

    calls: list[torch.Tensor] = []
    model = Failing()
    own = dict(model.named_parameters())
    learner = FOMAML(model, 0.3, 4, criterion)
    given = support()._replace(targets=torch.randn(6))
    with pytest.raises(ArithmeticError if fails == "raises" else InputError, match=r"the third|shape"):
        learner.adapt(given)
    assert len(calls) == 3 and not any(own["layer.weight"] is each for each in calls)
    assert all(value is own[name] for name, value in model.named_parameters())
    assert all("_original" not in vars(module) for module in model.modules())


def test_what_a_forward_pass_writes_through_the_module_itself_is_of_its_step():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.seen, self.times = [], 0

        def forward(self, inputs):
            model.seen.append(1)
            model.times += 1
            found.append((len(self.seen), self.times, len(model.seen)))
            return self.layer(inputs)

    found: list[tuple] = []
    model = Counting()
    FOMAML(model, 0.3, 4).adapt(support())
    assert found == [(1, 1, 1)] * 4
    assert model.seen == [] and model.times == 0


def test_a_buffer_that_is_filled_from_a_later_step_on_is_kept():
    class Filling(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("last", None)

        def forward(self, inputs):
            calls.append(self.last)
            if len(calls) > 1:
                self.last = inputs.mean(0)
            return self.layer(inputs)

    calls: list[torch.Tensor | None] = []
    given = support()
    adapted = FOMAML(Filling(), 0.3, 4).adapt(given)
    assert [each is None for each in calls] == [True, True, False, False]
    torch.testing.assert_close(adapted.last, given.inputs.mean(0))


class Recurrent(nn.Module):
    """Layers that are called one by one and hold their weights in a list of their own, too."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs.view(-1, 2, 2))[0][:, -1])


@pytest.mark.parametrize("wrapped", [False, True])
def test_layers_that_refer_to_their_weights_elsewhere(wrapped):
    torch.manual_seed(0)
    model = Recurrent()
    model = nn.Sequential(model) if wrapped else model
    given = support()
    problem = Problem(FOMAML(model, 0.3, 4), Task(given, given), evaluating=True)
    for expected, _ in islice(problem.path(first_order=True), 4):
        pass
    found = dict(FOMAML(model, 0.3, 4).adapt(given).named_parameters())
    for key, value in expected.items():
        torch.testing.assert_close(found[key].data, value.detach())
        assert not torch.equal(value, model.get_parameter(key))
