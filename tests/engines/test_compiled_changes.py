"""compile=True after something has changed: what a cache of compiled functions may miss."""

import gc
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiling import assert_close, assert_current, made, unchanged, untouched
from convolutions import convolutional
from family import LR, assert_agrees, error
from fomaml.engines import meta_gradient
from fomaml.engines.compiled import cache
from fomaml.errors import InputError
from fomaml.learning.adapt import SGD
from fomaml.learning.algorithms import FOMAML
from fomaml.models import BatchNorm, Conv4Strided
from fomaml.tasks import Task
from zoo import draw, example


def test_follows_the_optimiser(any_kind):
    learner, tasks, options = any_kind
    optimizer = torch.optim.Adam(learner.parameters(), 0.05)
    losses = []
    for _ in range(4):
        result = assert_current(learner, tasks, **options)
        losses.append(result.query_losses.mean().item())
        result.apply_to(learner)
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01
    assert made(learner) == 1
    for parameter in learner.parameters():  # other tensors under the same names
        parameter.data = parameter.data.clone() * 0.9
    assert_current(learner, tasks, **options)
    learner.model.load_state_dict({n: t * 0.5 for n, t in learner.model.state_dict().items()}, assign=True)
    assert_current(learner, tasks, **options)
    assert made(learner) == 1


def test_follows_the_dtype(any_kind):
    learner, tasks, options = any_kind
    expected = assert_current(learner, tasks, **options)
    learner.float()
    found = meta_gradient(learner, tasks.to(dtype=torch.float32), compile=True, **options)
    assert all(gradient.dtype == torch.float32 for gradient in found.gradients.values())
    assert_close(found, expected, 1e-4)
    learner.double()
    assert_current(learner, tasks, **options)
    assert made(learner) == 2


def test_follows_the_dtype_where_the_inputs_are_whole_numbers(monkeypatch):
    untouched(monkeypatch)
    learner = FOMAML(nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)), LR, 2)
    tasks = draw((2,), F.cross_entropy, ways=2).map(lambda t: (t.abs() * 2).long() % 5)
    tasks = Task(*(part._replace(targets=part.targets % 2) for part in tasks))
    for dtype in (torch.float32, torch.float64):
        learner.to(dtype)
        found = meta_gradient(learner, tasks, engine="batched", compile=True)
        assert_close(found, meta_gradient(learner, tasks, engine="loop"), 1e-5)
        assert all(gradient.dtype == dtype for gradient in found.gradients.values())


def test_follows_the_shapes_of_the_tasks(any_kind):
    learner, tasks, options = any_kind
    assert_current(learner, tasks, **options)
    assert_current(learner, Task(tasks.support, tasks.support), **options)
    two = tasks.map(lambda tensor: tensor[:2])
    assert_current(learner, two, **options)
    assert_current(learner, tasks.map(lambda tensor: tensor[:, :7]), **options)
    assert_current(
        learner, tasks.map(lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 2 else tensor)
    )
    assert_current(learner, tasks.map(lambda tensor: tensor[:1].expand_as(tensor)), **options)
    assert_current(learner, tasks, **options)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 9])
def test_tasks_at_once(any_kind, size):
    learner, _, options = any_kind
    shape = (2, 8, 8) if options["engine"] == "loop" else (1, 6, 6)
    tasks = draw(shape, F.cross_entropy, tasks=6)
    result = assert_current(learner, tasks, tasks_at_once=size, **options)
    assert len(result.query_losses) == 6
    assert made(learner) == 1


def test_follows_the_mode_of_each_module(monkeypatch):
    untouched(monkeypatch)
    for model, shape in [
        (nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 4)), (6,)),
        (None, (2, 8, 8)),
    ]:
        if model is None:
            model, _, _ = convolutional("batch-norm")
            model[1].running_var.fill_(3.0)
        learner, tasks = FOMAML(model.double(), LR, 1), draw(shape, F.cross_entropy)
        first = meta_gradient(learner, tasks, compile=True)
        model[1].eval()
        second = assert_current(learner, tasks)
        assert error(second.gradients, first.gradients) > 1e-3
        model[1].train()
        learner.eval()
        assert_current(learner, tasks)


def test_follows_inner_steps_rates_and_order(any_kind):
    learner, tasks, options = any_kind
    for inner_steps in (2, 1, 3):
        learner.inner_steps = inner_steps
        assert_current(learner, tasks, **options)
    learner.inner_lr.sizes = dict.fromkeys(learner.inner_lr.sizes, 0.01)
    assert_current(learner, tasks, **options)
    learner.optimizer = SGD(momentum=0.5)
    assert_current(learner, tasks, **options)
    learner.criterion = partial(F.cross_entropy, label_smoothing=0.2)
    assert_current(learner, tasks, **options)
    learner.first_order = lambda iteration: iteration < 5
    for iteration in (0, 5, 0):
        learner.iteration = iteration
        assert_current(learner, tasks, **options)


def test_follows_the_buffers(any_kind):
    learner, tasks, options = any_kind
    if options["engine"] == "loop":
        model = Conv4Strided(4, channels=3, in_channels=2, policy="running").double().eval()
        learner = FOMAML(model, LR, 1)
        for _ in range(2):
            check = unchanged(model)
            assert_current(learner, tasks, **options)
            check()
            learner.update_statistics(tasks, 0.5)
    else:
        model, tasks, _ = example("user")
        learner = FOMAML(model, LR, 1)
        for number in (0.0, 3.0, -2.0):
            model.calls.fill_(number)
            check = unchanged(model)
            assert_current(learner, tasks, **options)
            check()


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_forgets_learners_that_are_gone(engine, monkeypatch):
    untouched(monkeypatch)
    model, tasks, _ = convolutional("batch-norm")
    learner = FOMAML(model, LR, 1)
    meta_gradient(learner, tasks, engine=engine, compile=True)
    gone = weakref.ref(learner)
    del learner, model
    gc.collect()
    assert gone() is None


CHANGES = {
    "another layer": lambda model: setattr(model, "1", BatchNorm(4, policy="support").double()),
    "a policy": lambda model: setattr(model[1], "policy", "support"),
    "a constant of the norm": lambda model: setattr(model[1], "eps", 0.5),
    "a slope": lambda model: setattr(model[2], "negative_slope", 0.7),
    "an own attribute": lambda model: setattr(model[3], "power", 1.5),
    "a whole number": lambda model: setattr(model[3], "number", 3),
    "in a list": lambda model: model[3].several.__setitem__(0, 3.0),
    "in a dict in a list": lambda model: model[3].nested[0].update(a=3.0),
    "a tensor": lambda model: setattr(model[3], "mask", torch.full((), 0.5).double()),
    "a tensor in a dict": lambda model: model[3].masks.update(a=torch.full((), 0.5).double()),
    "a function": lambda model: setattr(model[3], "function", torch.tanh),
    "a new hook": lambda model: model[0].register_forward_hook(lambda module, inputs, outputs: outputs * 2),
}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.power, self.number, self.calls = 1.0, 1, 0
        self.several, self.nested = [1.0, 5], [{"a": 1.0}]
        self.mask, self.masks = torch.ones(()).double(), {"a": torch.ones(()).double()}
        self.function = torch.sigmoid
        self.seen, self.history = None, []

    def forward(self, inputs):
        self.calls += 1
        self.seen = inputs
        self.history.append(inputs)
        scale = self.power * self.number * self.several[0] * self.nested[0]["a"] * self.mask * self.masks["a"]
        return self.function(inputs) * scale


@pytest.mark.parametrize(
    ("change", "engine"),
    [(change, "loop") for change in CHANGES]
    + [
        # what is compared is the same for both engines
        pytest.param(
            change,
            "batched",
            marks=[pytest.mark.long] * (change not in ("a policy", "a tensor", "a function")),
        )
        for change in CHANGES
    ],
)
def test_a_changed_module_is_compiled_again(change, engine, monkeypatch):
    untouched(monkeypatch)
    layers = [
        nn.Conv2d(2, 4, 3),
        BatchNorm(4),
        nn.LeakyReLU(),
        Scaled(),
        nn.Flatten(),
        nn.Linear(144, 4),
    ]
    model = nn.Sequential(*layers).double()
    tasks = draw((2, 8, 8), F.cross_entropy, tasks=2)
    learner = FOMAML(model, LR, 2)
    before = meta_gradient(learner, tasks, engine=engine, compile=True)
    function = cache._watched[learner]
    meta_gradient(learner, tasks, engine="loop")  # counts, which is no change
    meta_gradient(learner, tasks, engine=engine, compile=True)
    assert cache._watched[learner] is function
    CHANGES[change](model)
    after = meta_gradient(learner, tasks, engine=engine, compile=True)
    assert (before.query_losses - after.query_losses).abs().max() > 1e-6
    assert_agrees(after, meta_gradient(FOMAML(model, LR, 2), tasks, engine="loop"), 1e-10)


def test_what_changes_all_the_time_is_named(monkeypatch):
    untouched(monkeypatch)
    model = nn.Sequential(Scaled(), nn.Linear(6, 4)).double()
    learner, tasks = FOMAML(model, LR, 1), draw((6,), F.cross_entropy, tasks=2)

    def calls(times):
        for _ in range(times):
            model[0].number += 1
            meta_gradient(learner, tasks, engine="loop", compile=True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(5)
    with pytest.warns(
        RuntimeWarning, match=r"^0\.number has changed 5 times; what is compiled has it"
    ) as told:
        calls(3)
    assert len(told) == 1 and told[0].filename == __file__


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_a_parameter_that_was_frozen_afterwards_is_named(engine, compile):
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 4)).double()
    tasks = draw((2, 8, 8), F.cross_entropy, tasks=2)
    learner = FOMAML(model, LR, 1)
    meta_gradient(learner, tasks, engine=engine, compile=compile)
    model[1].weight.requires_grad_(False)
    with pytest.raises(
        InputError, match=r"^the parameter 1.weight no longer requires a gradient: make a new"
    ):
        meta_gradient(learner, tasks, engine=engine, compile=compile)
