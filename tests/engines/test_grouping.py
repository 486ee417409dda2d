"""A figure never depends on how the work is grouped, on the engine, on what was called before, or on the grad mode.

Random modules, algorithms and tasks, by seed; without random draws, running statistics and carried moments, which come
from the first task of a meta-batch.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fomaml import evaluate, train
from fomaml.engines import curve, meta_gradient
from fomaml.errors import InputError
from fomaml.learning.adapt import SGD, Adam
from fomaml.learning.algorithms import (
    ANIL,
    FOMAML,
    MAML,
    MAMLPlusPlus,
    MetaSGD,
    ProtoMAML,
    Reptile,
    ZeroHeadMAML,
    iMAML,
)  # fmt: skip
from fomaml.learning.objectives import Implicit, MultiStepLoss
from fomaml.models import BatchNorm
from fomaml.tasks import Examples, Task, count, one

TASKS, EXAMPLES = 5, 12


@dataclass(frozen=True)
class Clipped:
    """An inner optimiser that looks at a whole tensor: the gradient, clipped by its norm, with momentum."""

    second_order, carried, elementwise = True, False, False

    def direction(self, gradient, parameter, state, step):
        velocity = gradient + 0.5 * state.get("velocity", 0.0)
        state["velocity"] = velocity
        return velocity / torch.clamp(velocity.norm() / 0.05, min=1.0)


@dataclass(frozen=True)
class Centred:
    """One that takes the mean of each gradient away, as gradient centralisation does."""

    second_order, carried, elementwise = True, False, False

    def direction(self, gradient, parameter, state, step):
        return gradient - gradient.mean() + 0.01 * parameter.sum()


class Sum(nn.Module):
    """Two parameters that autograd hands one gradient."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(width) / 3), nn.Parameter(torch.zeros(width))

    def forward(self, inputs):
        return inputs * (self.a + self.b)


class Counting(nn.Module):
    """A buffer that forward assigns, and one that it writes into."""

    def __init__(self):
        super().__init__()
        self.register_buffer("assigned", torch.ones(()))
        self.register_buffer("written", torch.ones(()))

    def forward(self, inputs):
        self.assigned = self.assigned * 0.9 + inputs.detach().mean() / 10
        self.written.mul_(0.9)
        return inputs * (self.assigned + self.written)


class Complex(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.turn = nn.Parameter(torch.randn(width, dtype=torch.complex128) / 3)

    def forward(self, inputs):
        return (inputs * self.turn).abs() + inputs


class Squared(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Bilinear(width, width, width)

    def forward(self, inputs):
        return self.layer(inputs, inputs.tanh())


LAYERS = [
    lambda width: nn.Linear(width, width),
    lambda width: nn.Linear(width, width, bias=False),
    nn.LayerNorm,
    BatchNorm,
    lambda width: nn.BatchNorm1d(width, track_running_stats=False),
    lambda width: nn.GroupNorm(2, width),
    Sum,
    lambda width: Counting(),
    lambda width: nn.utils.parametrizations.weight_norm(nn.Linear(width, width)),
    Squared,
    Complex,
]
NONLINEAR = [nn.Tanh, nn.GELU, nn.Softplus, nn.SiLU]


class Random(nn.Module):
    """Some layers, in random order, and a head; images go through a convolution first."""

    def __init__(self, choose, images):
        super().__init__()
        self.images = images
        if images:
            self.convolution = nn.Conv2d(2, 8, 3, stride=choose.choice([1, 2]))
        else:
            self.into = nn.Linear(6, 8)
        self.body = nn.Sequential()
        for _ in range(choose.randint(1, 3)):
            self.body.append(choose.choice(LAYERS)(8))
            self.body.append(choose.choice(NONLINEAR)())
        if choose.random() < 0.3:
            self.body.append(self.body[0])  # shared
        self.head = nn.Linear(8, 4)

    def forward(self, inputs):
        hidden = self.convolution(inputs).tanh().mean((2, 3)) if self.images else self.into(inputs)
        return self.head(self.body(hidden))


def algorithms(choose):
    first_order = choose.choice([True, False])
    optimizer = choose.choice([SGD(), SGD(momentum=0.5), Clipped(), Centred()])
    inner = {"first_order": first_order, "optimizer": optimizer}
    batch = {"inner_batch_size": choose.choice([None, 5])}
    return choose.choice([
        lambda model: FOMAML(model, 0.2, 2, **inner, **batch),
        lambda model: FOMAML(model, 0.2, 2),
        lambda model: MAML(model, 0.2, 2, **batch),
        lambda model: ANIL(model, 0.2, 2, head="head.*", **inner),
        lambda model: ZeroHeadMAML(model, 0.2, 2, head="head", **inner),
        lambda model: ProtoMAML(model, 0.1, 2, head="head", **inner),
        lambda model: MetaSGD(model, 0.2, 2, first_order=first_order),
        lambda model: Reptile(model, 0.01, 2, optimizer=Adam(), **batch),
        lambda model: Reptile(model, 0.2, 2, optimizer=choose.choice([Clipped(), SGD()])),
        lambda model: iMAML(model, 0.1, 2, strength=2.0),
        lambda model: MAMLPlusPlus(model, 0.1, 2, multi_step_iterations=10),
    ])  # fmt: skip


def situation(seed):
    """(learner, tasks): in half of all cases tasks of two to four ways, all of the same number of examples."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    images = choose.random() < 0.4
    model = Random(choose, images).double()
    algorithm = algorithms(choose)
    learner = algorithm(model)
    if isinstance(learner.objective, Implicit) and any(p.is_complex() for p in model.parameters()):
        learner = FOMAML(model, 0.2, 2)  # the implicit gradient refuses complex parameters
    shape = (2, 5, 5) if images else (6,)
    mixed = choose.random() < 0.5
    ways = [choose.choice([2, 3, 4]) if mixed else 4 for _ in range(TASKS)]
    labels = torch.stack([torch.arange(EXAMPLES) % each for each in ways])
    parts = [Examples(torch.randn(TASKS, EXAMPLES, *shape).double(), labels) for _ in range(2)]
    return learner, Task(*parts)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def assert_same(found, expected, rows=None):
    rows = slice(None) if rows is None else rows
    assert set(found.gradients) == set(expected.gradients)
    for name, gradient in expected.gradients.items():
        close(found.gradients[name], gradient)
    close(found.query_losses, expected.query_losses[rows])
    close(found.support_losses, expected.support_losses[rows])
    close(found.query_outputs, expected.query_outputs[rows])


def engines(learner, tasks):
    """The engines that take the learner."""
    found = []
    for engine in ("batched", "factored"):
        try:
            meta_gradient(learner, tasks, engine=engine)
            found.append(engine)
        except InputError as error:
            assert "does not take" in str(error)
    return found


SEEDS = range(16)
MORE = [*SEEDS, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(16, 200))]


@pytest.mark.parametrize("seed", MORE)
def test_a_meta_gradient_does_not_depend_on_the_grouping(seed):
    learner, tasks = situation(seed)
    expected = meta_gradient(learner, tasks, engine="loop")
    # the engine, and how many tasks at once
    for engine in engines(learner, tasks):
        for at_once in (1, 2, TASKS):
            assert_same(meta_gradient(learner, tasks, engine=engine, tasks_at_once=at_once), expected)
    assert_same(meta_gradient(learner, tasks), expected)
    # the order of the tasks
    order = torch.randperm(TASKS)
    assert_same(meta_gradient(learner, tasks.map(lambda t: t[order])), expected, order)
    # meta-batches of one task
    alone = [meta_gradient(learner, tasks.map(lambda t, i=i: t[i : i + 1])) for i in range(TASKS)]
    for name, gradient in expected.gradients.items():
        close(sum(each.gradients[name] for each in alone) / TASKS, gradient)
    close(torch.cat([each.query_losses for each in alone]), expected.query_losses)
    # what was called before
    learner.adapt(one(tasks, 0).support)
    curve(learner, tasks, [0, 3])
    learner(tasks).backward()
    learner.zero_grad()
    assert_same(meta_gradient(learner, tasks), expected)
    # the grad mode
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = meta_gradient(learner, tasks)
        assert_same(found, expected)
    # autograd's own way
    if not isinstance(learner.objective, MultiStepLoss):
        learner(tasks).backward()
        for name, parameter in learner.meta_parameters().items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            close(gradient, expected.gradients[name])


class Given:
    """Episodes of given tasks."""

    def __init__(self, tasks):
        self.tasks = tasks

    def batch(self, start, tasks):
        return self.tasks.map(lambda tensor: tensor[start : start + tasks])


@pytest.mark.parametrize("seed", MORE)
def test_an_evaluation_does_not_depend_on_the_grouping(seed):
    learner, tasks = situation(seed)
    learner.model.eval() if seed % 2 else learner.model.train()
    steps = [0, 1, 3]
    expected = curve(learner, tasks, steps, engine="loop")
    for index in range(TASKS):  # alone
        for (losses, outputs), (all_losses, all_outputs) in zip(
            curve(learner, tasks.map(lambda t, i=index: t[i : i + 1]), steps), expected
        ):
            close(losses[0], all_losses[index])
            close(outputs[0], all_outputs[index][:, : outputs.shape[-1]])
            assert (all_outputs[index][:, outputs.shape[-1] :] == -torch.inf).all()
    for engine in ("auto", "loop", *engines(learner, tasks)):
        for at_once in (1, 2, TASKS):
            for found, known in zip(
                curve(learner, tasks, steps, engine=engine, tasks_at_once=at_once), expected
            ):
                close(found, known)
    scores = evaluate(learner, Given(tasks), tasks=TASKS, at_steps=steps, tasks_at_once=1)
    with torch.inference_mode():
        again = evaluate(learner, Given(tasks), tasks=TASKS, at_steps=steps[::-1], tasks_at_once=3)
    for each in steps:
        close(again[each], scores[each])
    for index in range(TASKS):  # and the adapted module gives the same outputs
        own = learner.adapt(one(tasks, index).support, steps=3)
        if seed % 2 and not any(isinstance(m, Counting) for m in own.modules()):
            outputs = own(tasks.query.inputs[index])
            close(outputs, expected[-1][1][index][:, : outputs.shape[-1]])


def test_unequal_ways_are_among_the_situations():
    mixed = [len({int(t.max()) for t in situation(seed)[1].support.targets}) > 1 for seed in SEEDS]
    started = [situation(seed)[0].start is not None for seed in SEEDS]
    assert sum(a and b for a, b in zip(mixed, started)) >= 2
    assert sum(not situation(seed)[0].optimizer.elementwise for seed in SEEDS) >= 3
    assert count(situation(0)[1]) == TASKS


def test_clipping_scales_no_gradient_twice():
    """Of two parameters that autograd hands one tensor, in training with one task."""
    model = nn.Sequential(nn.Linear(6, 8), Sum(8), nn.Linear(8, 4)).double()
    tasks = situation(1)[1]
    tasks = Task(*(Examples(torch.randn(1, EXAMPLES, 6).double(), part.targets[:1]) for part in tasks))
    learner = FOMAML(model, 0.1, 1)
    expected = torch.stack([g.norm() for g in meta_gradient(learner, tasks).gradients.values()]).norm()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    limit = float(expected) / 7
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    list(train(learner, Given(tasks), optimizer, iterations=1, meta_batch_size=1, clip=limit))
    moved = torch.stack([(p - before[name]).norm() for name, p in model.named_parameters()]).norm()
    assert moved.item() == pytest.approx(limit, rel=1e-5)
    close(model[1].a - before["1.a"], model[1].b - before["1.b"])
