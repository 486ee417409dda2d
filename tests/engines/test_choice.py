"""Which engine is chosen, and what is said where one does not suit."""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from family import LR, STEPS, answer, assert_agrees
from fomaml.engines import curve, meta_gradient
from fomaml.engines.plan import choice, choose
from fomaml.errors import InputError
from fomaml.learning.algorithms import FOMAML
from fomaml.models import MLP, BatchNorm, Conv4, Conv4Strided
from fomaml.tasks import Examples, Task
from zoo import draw, example


@pytest.mark.parametrize(
    ("build", "shape", "shots", "expected", "compiled"),
    [
        (partial(Conv4, 4), (1, 28, 28), 1, "loop", "batched"),
        (partial(Conv4, 4), (1, 28, 28), 4, "loop", "loop"),
        (partial(Conv4, 4, channels=8, image=(1, 16, 16)), (1, 16, 16), 1, "batched", "batched"),
        (partial(MLP, 784, 256, 4), (784,), 1, "factored", "factored"),
        (partial(MLP, 784, 256, 4), (784,), 100, "loop", "batched"),
        (partial(MLP, 1, 40, 40, 4), (1,), 20, "batched", "batched"),
        (
            partial(nn.TransformerEncoderLayer, 32, 2, 64, 0.0, batch_first=True),
            (40, 32),
            1,
            "batched",
            "batched",
        ),
        (partial(nn.LSTMCell, 6, 4), (6,), 1, "loop", "loop"),
        (partial(nn.Embedding, 6, 4, sparse=True), (), 1, "loop", "loop"),
    ],
)
def test_choose_names_the_engine_and_the_reason(build, shape, shots, expected, compiled):
    def criterion(outputs, targets):
        return (outputs[0] if isinstance(outputs, tuple) else outputs).square().mean()

    learner = FOMAML(build().double(), LR, STEPS, criterion)
    tasks = draw(shape, F.cross_entropy, shots=shots)
    if isinstance(learner.model, nn.Embedding):
        tasks = tasks._replace(
            **{part: Examples(e.targets, e.targets) for part, e in tasks._asdict().items()}
        )
    assert choose(learner, tasks, compile=True)[0] == compiled
    name, reason = choose(learner, tasks)
    assert name == expected
    assert reason and "\n" not in reason


def block(kind=nn.Conv2d, channels=32, norm=nn.BatchNorm2d, **options):
    """Eight million operations for an image of 28 x 28."""
    layers = [kind(1, channels, 3, padding=1), norm(channels), nn.ReLU()]
    layers += [kind(channels, channels, 3, padding=1, **options), norm(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(5))


BLOCKS = {
    "batch norm of torch": (block, "batched"),
    "batch norm": (partial(block, norm=BatchNorm), "batched"),
    "channels that vectors do not divide": (partial(block, channels=40), "loop"),
    "groups": (partial(block, groups=4), "loop"),
    "dilation": (partial(block, dilation=2), "loop"),
    "group norm": (partial(block, norm=partial(nn.GroupNorm, 4)), "loop"),
    "no norm": (partial(block, norm=nn.Identity), "loop"),
    "series": (partial(block, nn.Conv1d, norm=nn.BatchNorm1d), "loop"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_what_the_kernels_do_not_take_is_stacked_only_where_it_is_small(name):
    build, expected = BLOCKS[name]
    model = build()
    shape = (1, 28, 28) if isinstance(model[0], nn.Conv2d) else (1, 2000)
    labels = torch.arange(10) % 5
    sets = [Examples(torch.randn(2, 10, *shape), labels.expand(2, 10)) for _ in range(2)]
    with torch.no_grad():
        model(sets[0].inputs[0])
    learner = FOMAML(model.requires_grad_(), LR, STEPS)
    assert choose(learner, Task(*sets), compile=True)[0] == expected


@pytest.mark.parametrize(("query", "at_once"), [(5, 32), (25, 25), (50, 15), (75, 10)])
def test_fewer_tasks_of_larger_convolutions_are_stacked(query, at_once, monkeypatch):
    monkeypatch.setattr(sys.modules["fomaml.engines.plan"], "begin_kernels", lambda *given: None)
    labels = torch.arange(80) % 5
    sets = [Examples(torch.randn(40, n, 1, 28, 28), labels[:n].expand(40, n)) for n in (5, query)]
    learner = FOMAML(Conv4Strided(5), LR, 2)
    assert choice(learner, Task(*sets), "batched", None, compile=True).tasks_at_once == at_once
    assert choice(learner, Task(*sets), "batched", None, compile=False).tasks_at_once == 8


def test_auto_is_the_engine_of_choose():
    model, tasks, criterion = example("conv4")
    result = meta_gradient(FOMAML(model, LR, STEPS, criterion), tasks)
    assert result.engine == choose(FOMAML(model, LR, STEPS, criterion), tasks)[0] == "batched"
    assert_agrees(result, answer("fomaml", "conv4"), 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, "unknown engine 'fast'; there are: auto, loop, batched, factored"),
        ({"tasks_at_once": 0}, "tasks_at_once must be a whole number of 1 or more, got 0"),
    ],
)
def test_errors_of_meta_gradient_and_curve(options, message):
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, LR, STEPS, criterion)
    for call in (meta_gradient, partial(curve, at_steps=[1])):
        with pytest.raises(InputError) as raised:
            call(learner, tasks, **options)
        assert str(raised.value) == message


def test_outputs_narrower_than_the_classes_are_an_input_error():
    _, tasks, _ = example("mlp")
    with pytest.raises(InputError, match="3"):
        meta_gradient(FOMAML(MLP(36, 12, 3).double(), LR, STEPS), tasks)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("engine", ["auto", "batched"])
@pytest.mark.parametrize("shape", [(36,), (1, 6, 6)], ids=["dense", "convolutions"])
def test_too_few_outputs_are_told_in_words(shape, engine, compile, recwarn):
    """Also where what a task costs is counted before it is computed."""
    convolutions = [nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 3, 1), nn.Flatten()] if len(shape) > 1 else []
    model = nn.Sequential(nn.Flatten(), *convolutions, nn.Linear(108 if convolutions else 36, 3)).double()
    with pytest.raises(InputError, match="too narrow for 4 ways"):
        meta_gradient(
            FOMAML(model, LR, 1), draw(shape, F.cross_entropy, tasks=9), engine=engine, compile=compile
        )


def test_factored_refuses_a_model_without_adapted_linear_weights():
    model, tasks, criterion = example("conv4")
    with pytest.raises(InputError, match=r"no adapted nn\.Linear weight"):
        meta_gradient(FOMAML(model, LR, 1, criterion, adapted="body.*"), tasks, engine="factored")
