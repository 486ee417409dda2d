"""What works as a user would expect, in a form other than the plainest: each gives the same bits as that one."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from compiling import untouched
from fomaml import FOMAML, MLP, Examples, Reptile, Task, evaluate, meta_gradient, train
from fomaml.engines import curve
from fomaml.tasks import count, one


def model():
    torch.manual_seed(0)
    return MLP(6, 8, 4)


def drawn(number=6):
    random = torch.Generator().manual_seed(1)
    labels = (torch.arange(8) % 4).expand(number, -1)
    return Task(*(Examples(torch.randn(number, 8, 6, generator=random), labels) for _ in range(2)))


class Given:
    def __init__(self, tasks=None):
        self.tasks = tasks or drawn()

    def batch(self, start, tasks):
        rows = torch.arange(start, start + tasks) % count(self.tasks)
        return self.tasks.map(lambda tensor: tensor[rows])


def singles():
    return [one(drawn(), index) for index in range(6)]


class Forever(IterableDataset):
    def __iter__(self):
        yield from singles()


def arrays(dtype=np.float64, labels=np.int32):
    return tuple((part.inputs.numpy().astype(dtype), part.targets.numpy().astype(labels)) for part in drawn())


BATCHES = {
    "pairs": lambda: tuple(tuple(part) for part in drawn()),
    "lists": lambda: [list(part) for part in drawn()],
    "single tasks": singles,
    "arrays": arrays,
    "arrays of float32": lambda: arrays(np.float32, np.int64),
    "labels of int32": lambda: Task(*(Examples(part.inputs, part.targets.int()) for part in drawn())),
    "labels of int8": lambda: Task(*(Examples(part.inputs, part.targets.to(torch.int8)) for part in drawn())),
}


@pytest.mark.parametrize("form", BATCHES)
def test_a_batch_of_tasks(form):
    learner, given = FOMAML(model(), 0.1, 2), BATCHES[form]()
    expected, found = (meta_gradient(learner, tasks) for tasks in (drawn(), given))
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[name], gradient)
    [(losses, _)], [(same, _)] = (curve(learner, tasks, [2]) for tasks in (drawn(), given))
    assert torch.equal(losses, same) and torch.equal(learner(drawn()), learner(given))
    support = one(drawn(), 0).support
    pair = (support.inputs.numpy().astype(np.float64), support.targets.numpy())
    for each in (tuple(support), pair):
        own = learner.adapt(each)
        assert torch.equal(own(support.inputs), learner.adapt(support)(support.inputs))


STREAMS = {
    "a list": singles,
    "a generator": lambda: (task for task in singles() * 3),
    "a loader": lambda: DataLoader(singles(), batch_size=3),
    "a loader of other batches": lambda: DataLoader(singles(), batch_size=2),
    "a loader that ends with a smaller batch": lambda: DataLoader(singles(), batch_size=4),
    "a loader without batches": lambda: DataLoader(singles(), batch_size=None),
    "a loader of an iterable data set": lambda: DataLoader(Forever(), batch_size=3),
    "a loader of pairs": lambda: DataLoader([tuple(map(tuple, task)) for task in singles()], batch_size=3),
    "an iterable data set": Forever,
}


@pytest.mark.parametrize("form", STREAMS)
def test_training_takes_any_iterable_of_tasks(form):
    """As often as it has to: six tasks, four steps of three."""
    ends = []
    for episodes in (Given(), STREAMS[form]()):
        learner = FOMAML(model(), 0.1, 2)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        records = list(train(learner, episodes, optimizer, iterations=4, meta_batch_size=3))
        ends.append([record.meta_loss for record in records])
    assert all(map(torch.equal, *ends))


OPTIMIZERS = {
    "a step size that is a tensor": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)),
    "an optional closure": lambda p: torch.optim.SGD(p, lr=0.1),
    "two groups": lambda p: torch.optim.SGD([{"params": list(p)[:2]}, {"params": list(p)[2:]}], lr=0.1),
}


@pytest.mark.parametrize("form", OPTIMIZERS)
def test_optimisers(form):
    ends = []
    for make in (OPTIMIZERS["an optional closure"], OPTIMIZERS[form]):
        learner = FOMAML(model(), 0.1, 2)
        optimizer = make(list(learner.parameters()))
        run = train(
            learner, Given(), optimizer, iterations=3, meta_batch_size=2, schedule=lambda i: 1 / (i + 1)
        )
        list(run)
        ends.append([p.detach() for p in learner.parameters()])
        assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.1)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 / 3)
    for found, expected in zip(*ends):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_is_no_matter(mode):
    learner, support = FOMAML(model(), 0.1, 2), one(drawn(), 0).support
    expected = learner.adapt(support), evaluate(learner, Given(), tasks=4, at_steps=[0, 2])
    with mode():
        fresh = Given(drawn())  # tensors made in inference mode too
        found = learner.adapt(one(fresh.tasks, 0).support), evaluate(learner, fresh, tasks=4, at_steps=[0, 2])
    assert torch.equal(found[0](support.inputs), expected[0](support.inputs))
    assert all(torch.equal(found[1][steps], scores) for steps, scores in expected[1].items())
    F.cross_entropy(found[0](support.inputs), support.targets).backward()  # an ordinary module


class Weighted(nn.Module):
    """A criterion with parameters of its own, one of them frozen, and one that is the model's."""

    def __init__(self, shared):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.still = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.shared = shared

    def forward(self, outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return (losses * self.weight.tanh()[targets]).mean() + self.still * self.shared.square().sum()


@pytest.mark.parametrize("first_order", [True, False])
def test_a_criterions_own_parameters_learn(first_order, monkeypatch):
    untouched(monkeypatch)
    body = model()
    learner = FOMAML(body, 0.1, 2, Weighted(body[1].weight), first_order=first_order)
    names = set(learner.meta_parameters())
    assert "criterion.weight" in names and not names & {"criterion.still", "criterion.shared"}
    learner(drawn()).backward()
    assert learner.criterion.weight.grad.norm() > 0.01
    for options in ({"engine": "loop"}, {"engine": "batched"}, {"engine": "loop", "compile": True}):
        found = meta_gradient(learner, drawn(), **options)
        for name, parameter in learner.meta_parameters().items():
            torch.testing.assert_close(found.gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    # by hand: the model's weight in the criterion is the task's
    task, own = one(drawn(), 0), copy.deepcopy(learner)
    for _ in range(2):
        loss = own.criterion(own.model(task.support.inputs), task.support.targets)
        slopes = torch.autograd.grad(loss, list(own.model.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(own.model.parameters(), slopes):
                parameter -= 0.1 * slope
    loss = own.criterion(own.model(task.query.inputs), task.query.targets)
    [(found, _)] = curve(learner, drawn(), [2], engine="loop")
    torch.testing.assert_close(found[0], loss.detach())
    before = learner.criterion.weight.detach().clone()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    list(train(learner, Given(), optimizer, iterations=1, meta_batch_size=2))
    assert not torch.equal(learner.criterion.weight, before)


def test_reptile_leaves_a_criterion_as_it_is():
    body = model()
    learner = Reptile(body, 0.1, 2, Weighted(body[1].weight))
    assert not meta_gradient(learner, drawn()).gradients["criterion.weight"].any()


class Noisy(nn.Module):
    def forward(self, inputs):
        return inputs + torch.randn_like(inputs) if self.training else inputs


@pytest.mark.parametrize("layer", [lambda: nn.Dropout(0.9), nn.AlphaDropout, Noisy, nn.Dropout1d])
@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_evaluation_is_in_evaluation_mode(layer, engine):
    """Inner steps and query alike, in `evaluate`, `curve` and `adapt`; the model's own mode stays."""
    body = nn.Sequential(nn.Linear(6, 8), layer(), nn.BatchNorm1d(8), nn.Linear(8, 4))
    learner = FOMAML(body, 0.1, 2)
    found = [curve(learner, drawn(), [0, 2], engine=engine) for _ in range(2)]
    assert all(torch.equal(a, b) for one_, other in zip(*found) for a, b in zip(one_, other))
    support = one(drawn(), 0).support
    own, again = learner.adapt(support), learner.adapt(support)
    assert all(map(torch.equal, own.state_dict().values(), again.state_dict().values()))
    assert all(part.training for part in (*body.modules(), *own.modules()))
    scores = [evaluate(learner, Given(), tasks=6, at_steps=[2], engine=engine)[2] for _ in range(2)]
    assert torch.equal(*scores)
    trained = [meta_gradient(learner, drawn(), engine="loop").query_losses for _ in range(2)]
    assert not torch.equal(*trained)  # but training draws


def test_batch_norms_keep_what_adaptation_moved():
    body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    learner, support = FOMAML(body, 0.1, 5), one(drawn(), 0).support
    own, by_hand = learner.adapt(support), copy.deepcopy(body)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(by_hand(support.inputs), support.targets).backward()
        optimizer.step()
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], tensor)
    assert own[1].num_batches_tracked == 5 and body[1].num_batches_tracked == 0
