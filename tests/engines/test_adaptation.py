"""Adaptation compiled: curves and adapted modules against the slow loops of reference.py and the eager engines."""

import math
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import family
from clusters import episodes
from clusters import learner as of_clusters
from compiling import two_blocks
from convolutions import convolutional
from family import ALGORITHMS, LR, answer, error
from fomaml.engines import adapt, adaptation, adapter, curve, plan
from fomaml.engines.compiled import cache
from fomaml.engines.compiled.cache import too_old
from fomaml.errors import InputError
from fomaml.evaluate import evaluate
from fomaml.learning.algorithms import FOMAML
from fomaml.models import MLP, Conv4, Conv4Strided
from fomaml.tasks import Examples, one
from zoo import MODULES, draw, example

pytestmark = pytest.mark.skipif(bool(too_old()), reason=too_old())


def same(found, expected, tolerance=1e-12):
    """Whether tensors by name agree, relative to the largest entry of each."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().clamp(min=1e-30) if tensor.is_floating_point() else 1
        assert (found[name] - tensor).abs().max() <= tolerance * scale, name


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(MODULES, "conv4-strided", (two_blocks, (1, 7, 7), F.cross_entropy))
    monkeypatch.setattr(family, "STEPS", 2)


# the others differ in what networks have nothing to do with; of convolutions a trace takes a second or two
SHORT = {
    "mlp": {
        "fomaml",
        "meta-sgd",
        "maml++",
        "proto-maml",
        "fomaml-adam",
        "fomaml-minibatch",
        "maml-nesterov",
        "anil",
    },
    "conv4-strided": {"fomaml", "lslr", "proto-maml"},
}


@pytest.mark.parametrize(
    ("algorithm", "module"),
    [
        pytest.param(algorithm, module, marks=[] if algorithm in short else [pytest.mark.long])
        for module, short in SHORT.items()
        for algorithm in ALGORITHMS
        if ALGORITHMS[algorithm].modules(module)
    ],
)
def test_every_algorithm_reaches_what_the_reference_does(algorithm, module, small):
    row = ALGORITHMS[algorithm]
    model, tasks, criterion = example(module)
    learner = row.learner(model, criterion)
    expected = answer.__wrapped__(algorithm, module)
    for engine in ("loop", "batched") if module != "mlp" else ("loop", "batched", "factored"):
        if engine == "factored" and row.factored:
            continue
        [(_, start), (losses, outputs)] = curve(learner, tasks, [0, 2], engine=engine, compile=True)
        assert error({"": losses}, {"": expected.query_losses}) <= 1e-10
        assert error({"": outputs}, {"": expected.query_outputs}) <= 1e-10
        assert not torch.allclose(start, outputs)
    support = tasks.map(lambda tensor: tensor[0]).support
    again = adapter(learner, support)
    same(again(support).state_dict(), learner.adapt(support).state_dict())


SHORTEST = {("batch-norm", "batched"), ("own-norm", "loop"), ("conv4-running", "loop")}

# --- curves -----------------------------------------------------------------------------------------


def made(learner):
    """What was compiled for a learner; a failure shows as a warning, which is an error in tests."""
    return [found.function for found in cache._watched[learner].known.values() if found.function]


@pytest.mark.parametrize(
    ("module", "engine"),
    [
        pytest.param(module, engine, marks=[] if (module, engine) in SHORTEST else [pytest.mark.long])
        for module in ("batch-norm", "conv4-running", "own-norm", "residual", "plain")
        for engine in ("loop", "batched")
    ],
)
def test_convolutions_of_every_policy_at_every_statistics(module, engine):
    model, tasks, _ = convolutional(module)
    learner = FOMAML(model, LR, 1)
    native = any(isinstance(each, nn.BatchNorm2d) for each in model.modules())
    kinds = ["own"] if native else ["own", "support", "with-query"]
    points = [(steps, kind) for steps in (0, 2) for kind in kinds]
    own = plan(learner, tasks, engine=engine)
    for found, expected in zip(own.curve(tasks, points, compile=True), own.curve(tasks, points), strict=True):
        assert error({"": found[0]}, {"": expected[0]}) <= 1e-10
        assert error({"": found[1]}, {"": expected[1]}) <= 1e-10
    assert len(made(learner)) == 1


@pytest.mark.parametrize(("channels", "engine"), [(16, "batched"), (24, "loop")])
def test_what_the_kernels_do_not_take_is_adapted_one_by_one(channels, engine):
    model = Conv4Strided(4, channels=channels)
    del model.body[2:]
    tasks = draw((1, 6, 6), F.cross_entropy, tasks=4).to(dtype=torch.float32)
    own = plan(FOMAML(model, LR, 2), tasks)
    [(_, outputs)] = own.curve(tasks, [(2, "own")], compile=True)
    [(_, expected)] = own.curve(tasks, [(2, "own")])
    assert own.way.engine == engine
    torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stack", [3])
def test_outputs_do_not_depend_on_how_tasks_are_stacked(stack, monkeypatch):
    torch.manual_seed(0)
    model = Conv4Strided(4, channels=16)
    del model.body[1:]
    tasks = draw((1, 6, 6), F.cross_entropy, tasks=5).to(dtype=torch.float32)
    learner = FOMAML(model, LR, 2)
    found = []
    for size in (1, stack):
        monkeypatch.setattr(adaptation, "even", lambda number, most, size=size: size)
        own = plan(learner, tasks, engine="batched")
        [(losses, outputs)] = own.curve(tasks, [(2, "own")], compile=True)
        assert own.way.tasks_at_once == size
        found += [losses, outputs]
    assert len(outputs) == 5 and torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_a_list_of_tasks_of_several_shapes():
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, LR, 2, criterion)
    many = [one(tasks, number) for number in (0, 1, 2, 0)]
    many[1] = many[1]._replace(query=Examples(*(tensor[:2] for tensor in many[1].query)))
    [found] = curve(learner, many, [2], engine="batched", compile=True)
    [expected] = curve(learner, many, [2], engine="batched")
    assert len(found[1]) == 4 and len(made(learner)) == 1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_what_draws_random_numbers_runs_uncompiled():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 4).double()

        def forward(self, inputs):
            return self.head(F.dropout(inputs, 0.5, training=True))

    learner = FOMAML(Noisy(), LR, 2)
    tasks = draw((6,), F.cross_entropy)
    found = []
    for compile in (False, True):
        torch.manual_seed(1)
        found.append(curve(learner, tasks, [2], engine="loop", compile=compile))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_parameters_are_read_anew_and_other_points_compiled_anew():
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, LR, 2, criterion)
    run = partial(curve, learner, tasks, [2], engine="factored")
    first = run(compile=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
    torch.testing.assert_close(run(compile=True), run(), rtol=1e-10, atol=1e-10)
    assert (run()[0][1] - first[0][1]).abs().max() > 0.1 and len(made(learner)) == 1
    curve(learner, tasks, [1, 2], engine="factored", compile=True)
    assert len(made(learner)) == 2


# --- one task after the other -----------------------------------------------------------------------


def test_adapted_modules_are_independent():
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, LR, 2, criterion)
    again = adapter(learner, one(tasks, 0).support)
    first, second = again([one(tasks, number).support for number in (0, 1)])
    expected = [learner.adapt(one(tasks, number).support) for number in (0, 1)]
    with torch.no_grad():
        for parameter in (*first.parameters(), *model.parameters()):
            parameter += 1
    same(second.state_dict(), expected[1].state_dict())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in second.parameters())
    second.requires_grad_().train()
    criterion(second(one(tasks, 1).query.inputs), one(tasks, 1).query.targets).backward()


@pytest.mark.parametrize("name", ["mlp", "conv4-strided"])
def test_an_adapted_module_holds_no_more_memory_than_its_own(name, tmp_path):
    model, tasks, criterion = example(name)
    support = one(tasks, 0).support
    found = adapter(FOMAML(model, LR, 2, criterion), support)(support)
    expected = {name: tensor.clone() for name, tensor in found.state_dict().items()}
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in found.parameters())
    found.share_memory()
    torch.save(found.state_dict(), tmp_path / "weights")
    same(torch.load(tmp_path / "weights", weights_only=True), expected)


@pytest.mark.parametrize("name", ["mlp", "conv4-strided"])
def test_an_adapter_follows_the_learner_and_takes_other_shapes(name, small):
    model, tasks, criterion = example(name)
    learner = FOMAML(model, LR, 2, criterion)
    support = one(tasks, 0).support
    again = adapter(learner, support, steps=3, statistics="support")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.1
    fewer = Examples(*(tensor[2:] for tensor in support))
    for each in (support, fewer):
        found, expected = again(each), learner.adapt(each, 3, "support")
        same(found.state_dict(), expected.state_dict())
        single = one(tasks, 0).query.inputs[:1]
        torch.testing.assert_close(found(single), expected(single), rtol=1e-10, atol=1e-10)
    assert len(made(learner)) == 2


def test_adapt_is_compiled_when_it_was_called_often_enough(monkeypatch):
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, LR, 2, criterion)
    support = one(tasks, 0).support
    monkeypatch.setattr(adaptation, "pays_again", lambda learner, tasks, calls, steps: calls > 2)
    for call in range(4):
        found = adapt(learner, support, compile="auto")
        assert (learner in cache._watched) == (call >= 2)
        same(found.state_dict(), learner.adapt(support).state_dict())
    same(adapt(learner, support, 0, compile=True).state_dict(), model.state_dict())
    kept = weakref.ref(learner)
    del learner
    assert kept() is None  # what is kept holds no learner


@pytest.mark.parametrize("compile", [True, False, "auto"])
def test_what_an_adapter_refuses(compile):
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, 1e200, 4, criterion)
    support = one(tasks, 0).support
    with pytest.raises(InputError, match="not finite: try a smaller inner_lr"):
        adapt(learner, support, compile=compile)
    with pytest.raises(InputError, match="statistics of an adapted module"):
        adapter(learner, support, statistics="with-query", compile=compile)


def test_what_is_compiled_refuses_what_is_not_finite():
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, LR, 2, criterion)
    support = one(tasks, 0).support
    again = adapter(learner, support)
    with pytest.raises(InputError, match="after 2 steps the parameters are not finite"):
        again(support._replace(inputs=support.inputs * math.inf))


# --- the rule ---------------------------------------------------------------------------------------


def test_evaluate_gives_the_same_scores_compiled():
    meta = of_clusters()
    options = {"tasks": 7, "at_steps": (0, 2), "metric": "loss", "tasks_at_once": 3}
    found = evaluate(meta, episodes(), compile=True, **options)
    for steps, expected in evaluate(meta, episodes(), compile=False, **options).items():
        torch.testing.assert_close(found[steps], expected, rtol=1e-5, atol=1e-5)
    assert len(made(meta)) == 1


@pytest.mark.parametrize(
    ("model", "shape", "least", "most"),
    [
        (partial(Conv4, 5), (1, 28, 28), 10, 300),
        (partial(Conv4Strided, 5), (1, 28, 28), 50, 2000),
        (partial(MLP, 784, 256, 5), (1, 28, 28), 2000, 10**6),
    ],
)
def test_it_pays_from_some_number_of_tasks_on(model, shape, least, most):
    tasks = draw(shape, F.cross_entropy, tasks=2).to(dtype=torch.float32)
    learner = FOMAML(model(), 0.1, 10)
    [paid, not_paid] = [
        adaptation.compiles("auto", learner, tasks, number, [(10, "own")]) for number in (most, least)
    ]
    assert paid and not not_paid
    assert not adaptation.compiles("auto", learner.bfloat16(), tasks, most, [(10, "own")])
    assert adaptation.compiles(True, learner, tasks, 1, [(10, "own")])


def test_compile_is_one_of_three():
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, LR, 2, criterion)
    with pytest.raises(InputError, match='compile is True, False or "auto", got 1'):
        adapt(learner, one(tasks, 0).support, compile=1)
    with pytest.raises(InputError, match="compile is True, False or \"auto\", got 'no'"):
        evaluate(of_clusters(), episodes(), tasks=2, compile="no")
