"""Meta-gradients in lower precision."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fomaml
from compiling import assert_close, two_blocks, unchanged, untouched
from fomaml.engines import batched, loop, meta_gradient
from fomaml.learning.adapt import Adam
from fomaml.learning.algorithms import FOMAML, MAML, ProtoMAML, ZeroHeadMAML
from fomaml.models import normalising
from fomaml.tasks import Examples, Task
from fomaml.train import train
from zoo import MODULES, example


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("module", "execution"),
    [
        ("mlp", "loop"),
        ("mlp", "batched"),
        ("mlp", "factored"),
        ("conv4-strided", "loop"),
        ("batch-norm", "loop"),
    ],
)
@pytest.mark.parametrize("preset", [FOMAML, MAML])
def test_autocast_is_near_float32_and_gives_float32(preset, module, execution, compile, monkeypatch):
    untouched(monkeypatch)
    if (preset, execution) == (MAML, "factored"):
        return
    monkeypatch.setitem(MODULES, "conv4-strided", (two_blocks, (1, 9, 9), F.cross_entropy))
    model, tasks, criterion = example(module)
    tasks = tasks.to(dtype=torch.float32)
    learner = preset(model.float(), 0.05, 2, criterion)
    expected = meta_gradient(learner, tasks, engine=execution)
    check = unchanged(model)
    found = meta_gradient(learner, tasks, engine=execution, compile=compile, autocast=torch.bfloat16)
    check()
    assert all(gradient.dtype == torch.float32 for gradient in found.gradients.values())
    assert_close(found, expected, 0.1)
    assert (found.query_losses - expected.query_losses).abs().max() <= 0.05
    assert any((found.gradients[n] != expected.gradients[n]).any() for n in expected.gradients)
    assert not torch.is_autocast_enabled("cpu")
    again = meta_gradient(learner, tasks, engine=execution, compile=compile)  # the two are not confused
    assert_close(again, expected, 1e-5)


def bfloat16_pieces():
    """A learner by name, and tasks, whose numbers are of the size at which bfloat16 loses an inner step of 0.001."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), fomaml.BatchNorm(16, policy="running"), nn.ReLU(), nn.Linear(16, 3)
    )
    model = nn.Sequential(OrderedDict(body=model[:3], head=model[3]))
    inputs, labels = torch.randn(2, 4, 9, 8), (torch.arange(9) % 3).expand(4, 9)
    return model, Task(*(Examples(part, labels) for part in inputs))


STARTS = {
    "the meta-parameters": lambda model: FOMAML(model, 0.001, 1),
    "prototypes": lambda model: ProtoMAML(model, 0.001, 1),
    "prototypes, second order": lambda model: ProtoMAML(model, 0.001, 1, first_order=False),
    "a head of zeros": lambda model: ZeroHeadMAML(model, 0.001, 1),
    "one of the user's own, which forgets": lambda model: FOMAML(
        model, 0.001, 1, start=lambda start, problem: {n: p.bfloat16() for n, p in start.items()}
    ),
    "an inner Adam": lambda model: FOMAML(model, 0.001, 1, optimizer=Adam()),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_starts_and_inner_steps_keep_the_precision_of_the_parameters(start, engine):
    model, tasks = bfloat16_pieces()
    learner = STARTS[start](model)
    problem_of = {"loop": loop.problem, "batched": batched.problem}[engine]
    with torch.autocast("cpu", torch.bfloat16):
        problem = problem_of(learner, tasks)
        adapted, _ = next(problem.path())
    for name, value in adapted.items():
        before = problem.start[name]
        assert before.dtype == value.dtype == torch.float32
        if name == "head.weight":
            assert (before != value).double().mean() > 0.9


@pytest.mark.parametrize("start", STARTS)
def test_engines_agree_under_autocast(start):
    model, tasks = bfloat16_pieces()
    learner = STARTS[start](model)
    found = [meta_gradient(learner, tasks, engine=e, autocast=torch.bfloat16) for e in ("loop", "batched")]
    for name, gradient in found[0].gradients.items():
        assert gradient.dtype == found[1].gradients[name].dtype == torch.float32
    assert_close(*found, 0.1)


@pytest.mark.parametrize("policy", ["batch", "support", "running", "per-step"])
def test_statistics_of_a_batch_norm_are_float32(policy):
    norm = fomaml.BatchNorm(2, policy=policy, steps=1)
    inputs = 1000 + torch.randn(64, 2)  # bfloat16 knows every fourth number there
    rounded = inputs.bfloat16()
    seen = []
    with normalising(record=seen, first=64):
        found = norm(rounded)
    [(_, _, mean, variance)] = seen
    assert found.dtype == torch.bfloat16 and mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean, rounded.double().mean(0).float())
    norm.update(0, mean, variance, 1.0)


def test_what_is_around_the_step_has_its_precision():
    """The scores before, and the moments and statistics that the step leaves, are of passes in its precision."""
    model, tasks = bfloat16_pieces()
    learner = FOMAML(model, 0.001, 1, optimizer=Adam(carried=True))
    kinds = []
    model.head.register_forward_pre_hook(
        lambda module, given: kinds.append(F.linear(*given, module.weight).dtype)
    )

    class Same:
        ways, copies = 3, 1

        def batch(self, start, number):
            return tasks.map(lambda tensor: tensor[:number])

    for autocast in (torch.bfloat16, None):
        optimizer = torch.optim.SGD(learner.parameters(), 0.1)
        records = train(
            learner, Same(), optimizer, iterations=1, meta_batch_size=4, engine="loop", autocast=autocast
        )
        kinds.clear()
        list(records)
        # the plan tries the learner and evaluates in the model's own precision
        expected = torch.float32 if autocast is None else torch.bfloat16
        assert kinds[-6:] == [expected] * 6 and kinds.count(expected) >= 12
