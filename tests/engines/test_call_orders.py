"""A choice depends on the learner, the shapes, the device and the threads alone, not on what was called before."""

import gc
import weakref
from contextlib import nullcontext
from functools import partial
from itertools import permutations
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from family import LR, STEPS
from fomaml.engines import choose, curve, meta_gradient, plan, probes
from fomaml.engines.common import differentiate
from fomaml.engines.compiled import cache
from fomaml.errors import InputError
from fomaml.evaluate import evaluate
from fomaml.learning.adapt import SGD
from fomaml.learning.algorithms import FOMAML
from fomaml.learning.objectives import Displacement
from fomaml.learning.starts import ZeroHead
from fomaml.models import MLP
from fomaml.train import train
from zoo import draw


class Repeated:
    """Episodes that are the same batch again and again."""

    def __init__(self, tasks):
        self.tasks = tasks

    def batch(self, start, tasks):
        return self.tasks.map(lambda tensor: tensor[:tasks])


class Moody(nn.Module):
    """Changes nothing, and in training mode vmap does not take it."""

    def forward(self, inputs):
        if self.training:
            float(inputs.detach().sum())
        return inputs


def wide():
    return MLP(256, 128, 4)


def small():
    return MLP(6, 8, 4)


def strided():
    return nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))


def moody():
    return nn.Sequential(nn.Linear(6, 8), Moody(), nn.Linear(8, 4))


# name → builder, shape of an input, tasks, what is chosen, eager and compiled
CHOICES = {
    "wide": (wide, (256,), 3, ("factored", 3), ("factored", 3)),
    "small": (small, (6,), 3, ("batched", 3), ("batched", 3)),
    "strided": (strided, (1, 6, 6), 10, ("batched", 8), ("batched", 10)),
    "moody": (moody, (6,), 3, ("loop", 1), ("loop", 1)),
}


def made(name):
    build, shape, tasks, *_ = CHOICES[name]
    torch.manual_seed(1)
    return FOMAML(build().double(), LR, STEPS), draw(shape, F.cross_entropy, tasks=tasks)


def chosen(learner, tasks, **options):
    own = plan(learner, tasks, **options)
    return own.engine, own.tasks_at_once


# --- the order of calls ---------------------------------------------------------------------------


def under(mode, function, *arguments, **options):
    with mode():
        return function(*arguments, **options)


def with_wrong_labels(learner, tasks):
    """An error of the tasks, of the same shapes."""
    wrong = tasks.map(lambda tensor: tensor if tensor.is_floating_point() else tensor + 90)
    with pytest.raises(InputError, match="too narrow"):
        meta_gradient(learner, wrong)


def with_another(name, value, learner, tasks):
    own = getattr(learner, name)
    setattr(learner, name, value)
    meta_gradient(learner, tasks)
    setattr(learner, name, own)


def in_evaluation_mode(learner, tasks):
    learner.model.eval()
    meta_gradient(learner, tasks)
    learner.model.train()


def trained(learner, tasks):
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.01)
    for _ in train(
        learner, Repeated(tasks), optimizer, iterations=2, meta_batch_size=len(tasks.query.inputs)
    ):
        pass


def of_other_shapes(learner, tasks):
    meta_gradient(learner, tasks.map(lambda tensor: torch.cat([tensor] * 20, 1)))
    meta_gradient(learner, tasks.map(lambda tensor: tensor[:1]))


CALLS = {
    "no_grad": partial(under, torch.no_grad, curve, at_steps=[0]),
    "inference": partial(under, torch.inference_mode, curve, at_steps=[0]),
    "steps under no_grad": partial(under, torch.no_grad, curve, at_steps=[0, 2]),
    "choose under no_grad": partial(under, torch.no_grad, choose),
    "plan in inference": partial(under, torch.inference_mode, plan),
    "gradient": meta_gradient,
    "compiled": partial(meta_gradient, compile=True),
    "one at once": partial(meta_gradient, tasks_at_once=1),
    "loop": partial(meta_gradient, engine="loop"),
    "other shapes": of_other_shapes,
    "wrong labels": with_wrong_labels,
    "momentum": partial(with_another, "optimizer", SGD(momentum=0.9)),
    "second order": partial(with_another, "first_order", False),
    "evaluation mode": in_evaluation_mode,
    "evaluate": lambda learner, tasks: evaluate(learner, Repeated(tasks), tasks=2, at_steps=[0, 1]),
    "train": trained,
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("first", CALLS)
def test_a_choice_does_not_depend_on_what_was_called_before(first, name, monkeypatch):
    monkeypatch.setattr(cache, "function", lambda *_, **__: cache.Made(None))  # as where nothing compiles
    learner, tasks = made(name)
    eager, compiled = CHOICES[name][3:]
    random = Random(f"{name} {first}")
    order = [first, *random.sample([call for call in CALLS if call != first], 2)]
    for number, call in enumerate(order):
        CALLS[call](learner, tasks)
        with random.choice([nullcontext, torch.no_grad, torch.inference_mode])():
            assert chosen(learner, tasks) == eager, order[: number + 1]
            assert chosen(learner, tasks, compile=True) == compiled, order[: number + 1]
        assert meta_gradient(learner, tasks).engine == eager[0], order[: number + 1]
        assert meta_gradient(learner, tasks, compile=True).engine == compiled[0], order[: number + 1]


@pytest.mark.parametrize(
    "order", list(permutations(("no_grad", "inference", "gradient", "train"))), ids=" ".join
)
def test_the_bits_do_not_depend_on_what_was_called_before(order):
    learner, tasks = made("wide")
    expected = meta_gradient(learner, tasks, engine="factored").gradients
    for call in order[: order.index("train")]:
        CALLS[call](learner, tasks)
        found = meta_gradient(learner, tasks)
        assert all(torch.equal(found.gradients[name], value) for name, value in expected.items())
    CALLS["train"](learner, tasks)
    for call in order:
        CALLS[call](learner, tasks)
        found, again = meta_gradient(learner, tasks), meta_gradient(learner, tasks, engine="factored")
        assert all(torch.equal(found.gradients[name], value) for name, value in again.gradients.items())


@pytest.mark.parametrize("name", CHOICES)
def test_tasks_drawn_in_inference_mode_are_tried_like_others(name):
    learner, tasks = made(name)
    with torch.inference_mode():
        drawn = tasks.map(torch.clone)
        assert drawn.support.inputs.is_inference()
        assert chosen(learner, drawn) == CHOICES[name][3]
    assert chosen(learner, drawn) == CHOICES[name][3]


def test_a_plan_draws_no_random_numbers_and_moves_no_buffer():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    learner, tasks = FOMAML(model, LR, STEPS), draw((6,), F.cross_entropy)
    state = torch.get_rng_state()
    buffers = [buffer.clone() for buffer in model.buffers()]
    plan(learner, tasks, compile=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.buffers(), buffers))


def test_the_outer_iteration_does_not_change_the_choice(monkeypatch):
    """Of a learner that changes its order on the way: what is chosen has to take both."""

    def first_order_alone(learner, problem):
        if problem.stacked and not problem.first_order:
            raise RuntimeError("no second derivative")
        return differentiate(learner, problem)

    monkeypatch.setattr(probes, "differentiate", first_order_alone)
    learner, tasks = made("small")
    assert chosen(learner, tasks) == ("batched", 3)
    learner.first_order = lambda iteration: iteration < 10
    for learner.iteration in (0, 9, 10, 99):
        assert chosen(learner, tasks) == ("loop", 1)


# --- what the short forms keep --------------------------------------------------------------------

CHANGES = {
    "optimizer": SGD(momentum=0.9),
    "objective": Displacement(),
    "start": ZeroHead("3"),
    "inner_batch_size": 2,
    "first_order": False,
    "adapted": ["3.weight", "3.bias"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_learner_is_chosen_for_anew_and_the_old_one_again(name):
    learner, tasks = made("wide")
    assert meta_gradient(learner, tasks).engine == "factored"
    own = getattr(learner, name)
    setattr(learner, name, CHANGES[name])
    found = meta_gradient(learner, tasks).engine
    assert found == plan(learner, tasks).engine != "factored"
    setattr(learner, name, own)
    assert meta_gradient(learner, tasks).engine == "factored"


def test_a_module_in_another_mode_is_chosen_for_anew():
    learner, tasks = made("moody")
    for mode, engine in ((True, "loop"), (False, "batched"), (True, "loop")):
        learner.model[1].train(mode)
        assert meta_gradient(learner, tasks).engine == engine


def test_a_replaced_or_added_module_is_chosen_for_anew():
    learner, tasks = made("moody")
    learner.model[1] = nn.Sequential()
    assert meta_gradient(learner, tasks).engine == "batched"
    learner.model[1].append(Moody())
    assert meta_gradient(learner, tasks).engine == "loop"
    learner.model[1][0] = nn.ReLU()
    assert meta_gradient(learner, tasks).engine == "batched"


def test_a_learner_is_tried_once_for_the_same_shapes(monkeypatch):
    learner, tasks = made("small")
    forward, calls = learner.model.forward, []
    monkeypatch.setattr(learner.model, "forward", lambda inputs: calls.append(1) or forward(inputs))
    numbers = []
    for _ in range(3):
        meta_gradient(learner, tasks)
        numbers.append(len(calls))
        calls.clear()
    assert numbers[0] > numbers[1] == numbers[2] == STEPS + 1
    meta_gradient(learner, tasks.map(lambda tensor: tensor[:2]))
    assert len(calls) == numbers[0]


def test_what_is_kept_does_not_keep_the_learner():
    learner, tasks = made("wide")
    meta_gradient(learner, tasks)
    curve(learner, tasks, [0, 1])
    gone = weakref.ref(learner)
    del learner
    gc.collect()
    assert gone() is None
