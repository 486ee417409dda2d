"""What runs after forward computes with the task's tensors: recomputation, hooks, closures over the module."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomaml.engines import curve, meta_gradient
from fomaml.errors import InputError
from fomaml.learning.adapt import FastModel
from fomaml.learning.algorithms import FOMAML, Reptile
from fomaml.learning.replica import Replicas
from fomaml.tasks import one
from recomputed import MODULES, Again
from suspects import Box
from zoo import draw

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}") for text in ("`torch.jit.*", ".*weight_norm. is deprecated")
]
LR, STEPS = 0.3, 3


def twins(build):
    """(the module, the same without recomputation), with the same numbers in them."""
    found = []
    for again in (True, False):
        torch.manual_seed(1)
        found.append(build(again).double())
    return found


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12)


def grads(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def by_engine(model, tasks, first_order):
    return meta_gradient(FOMAML(model, LR, STEPS, first_order=first_order), tasks, engine="loop").gradients


def by_backward(model, tasks, first_order):
    FOMAML(model, LR, STEPS, first_order=first_order)(tasks).backward()
    return grads(model)


def by_hand(model, tasks, first_order):
    support, query = one(tasks, 0)
    fast = FastModel(model, first_order)
    for _ in range(STEPS):
        fast.step(F.cross_entropy(fast(support.inputs), support.targets), LR)
    F.cross_entropy(fast(query.inputs), query.targets).backward()
    return grads(model) | fast.module().state_dict()


def by_reptile(model, tasks, first_order):
    return meta_gradient(Reptile(model, LR, STEPS), tasks, engine="loop").gradients


def adapted(model, tasks, first_order):
    learner = FOMAML(model, LR, STEPS)
    [(losses, outputs)] = curve(learner, tasks, [STEPS], engine="loop")
    own = learner.adapt(one(tasks, 0).support)
    return {"losses": losses, "outputs": outputs, "own": own(tasks.query.inputs[0])}


@pytest.mark.parametrize("first_order", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("way", [by_engine, by_backward, by_hand, by_reptile, adapted])
@pytest.mark.parametrize("build", MODULES)
def test_what_runs_again_computes_with_the_tasks_tensors(build, way, first_order):
    if build.__name__ == "OwnFunction" and not first_order:
        pytest.skip("its backward pass is written for first order")
    tasks = draw((6,), F.cross_entropy)
    found, expected = (way(model, tasks, first_order) for model in twins(build))
    assert_same(found, expected)


def test_what_runs_again_is_seen_by_this_test(monkeypatch):
    """With the parameters swapped while forward runs, and no longer, the gradient is wrong."""

    def swap(self, replicas, tensors, *args):
        return self.modules[0](*args)

    monkeypatch.setattr(Replicas, "_run", swap)
    model, twin = twins(Again)
    tasks = draw((6,), F.cross_entropy)
    found, expected = (by_engine(each, tasks, True) for each in (model, twin))
    assert (found["a.weight"] - expected["a.weight"]).norm() > 0.1 * expected["a.weight"].norm()


def test_the_module_is_left_as_it_was():
    for model in twins(Again):
        before = [(module, vars(module), dict(vars(module))) for module in model.modules()]
        meta_gradient(FOMAML(model, LR, STEPS), draw((6,), F.cross_entropy), engine="loop")
        for module, own, content in before:
            assert vars(module) is own and all(own[key] is value for key, value in content.items())


def test_a_criterion_may_look_at_the_module():
    """At weights, at what forward left there, and by calling it: all of the task's."""

    class Leaves(Again):
        def forward(self, inputs):
            hidden = self.first(inputs)
            self.extra = hidden.square().mean()
            return self.c(self.second(hidden))

    def criterion_of(model):
        def criterion(outputs, targets):
            again = model(torch.ones(2, 6).double())
            return (
                F.cross_entropy(outputs, targets)
                + model.a.weight.square().sum()
                + model.extra
                + again.square().sum()
            )

        return criterion

    model, _ = twins(lambda again: Leaves(False))
    tasks = draw((6,), F.cross_entropy)
    by_copies: dict = {name: 0.0 for name, _ in model.named_parameters()}
    for index in range(3):
        task, own = one(tasks, index), copy.deepcopy(model)
        for _ in range(STEPS):
            loss = criterion_of(own)(own(task.support.inputs), task.support.targets)
            for p, g in zip(own.parameters(), torch.autograd.grad(loss, list(own.parameters()))):
                p.data -= 0.01 * g
        loss = criterion_of(own)(own(task.query.inputs), task.query.targets)
        found = torch.autograd.grad(loss, list(own.parameters()))
        by_copies = {name: by_copies[name] + g / 3 for name, g in zip(by_copies, found)}
    for engine in ("loop", "batched"):
        learner = FOMAML(model, 0.01, STEPS, criterion_of(model))
        assert_same(meta_gradient(learner, tasks, engine=engine).gradients, by_copies)
    with pytest.raises(InputError, match="used outside of a linear layer"):
        meta_gradient(FOMAML(model, 0.01, STEPS, criterion_of(model)), tasks, engine="factored")


def test_what_a_forward_of_fast_weights_leaves_on_the_module_stays():
    class Leaves(Again):
        def forward(self, inputs):
            self.extra = self.first(inputs).square().mean()
            return super().forward(inputs)

    model, _ = twins(lambda again: Leaves(False))
    fast = FastModel(model)
    outputs = fast(torch.ones(2, 6).double())
    [gradient] = torch.autograd.grad(model.extra + outputs.sum(), [model.a.weight])
    assert gradient.any()


class Reading(Again):
    """Reads the weight of its layer by an object of its own."""

    def set_up(self):
        self.box = Box(self.b.weight)

    def second(self, hidden):
        return F.linear(hidden, self.box.content, self.b.bias).tanh()


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("engine", ["loop", "batched", "auto"])
def test_a_parameter_that_no_replica_reaches_is_refused(engine, first_order):
    """But in the factored engine, which knows the weights of linear layers by what they are."""
    model, twin = Reading(False).double(), Again(False).double()
    twin.load_state_dict(model.state_dict())
    tasks = draw((6,), F.cross_entropy)
    with pytest.raises(
        InputError, match=r"reads its parameter 'b\.weight' by a reference that no copy of it"
    ):
        meta_gradient(FOMAML(model, LR, STEPS, first_order=first_order), tasks, engine=engine)
    for way in (by_backward, by_hand, adapted):
        with pytest.raises(
            InputError, match=r"reads its parameter 'b\.weight' by a reference that no copy of it"
        ):
            way(model, tasks, first_order)


BOX = SimpleNamespace()


class Global(Again):
    """Reaches its layer by a variable of the file."""

    def second(self, hidden):
        BOX.layer = BOX.own()
        return self.run(lambda h: BOX.layer(h).tanh(), hidden)


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("way", [by_engine, by_backward, by_hand, adapted])
def test_a_module_that_no_replica_reaches_is_refused(way, first_order):
    model, _ = twins(Global)
    BOX.own = weakref.ref(model.b)
    with pytest.raises(InputError, match="calls its Linear by a reference that no copy of it follows"):
        way(model, draw((6,), F.cross_entropy), first_order)


def plain():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def hooked():
    model = plain()
    model[0].weight.register_hook(lambda gradient: gradient / 2)
    return model


def inference():
    with torch.inference_mode():
        return plain()


REFUSED = {
    "data parallel": (
        lambda: nn.DataParallel(plain()),
        "the model, DataParallel, keeps .*: give the module that it wraps, its .mod",
    ),
    "a part of it": (lambda: nn.Sequential(nn.DataParallel(plain())), "the module '0', DataParallel, keeps"),
    "scripted": (lambda: torch.jit.script(plain()), "give the module that it was made of"),
    "traced": (lambda: torch.jit.trace(plain(), torch.ones(1, 6)), "give the module that it was made of"),
    "compiled": (lambda: torch.compile(plain()), "give the module that was compiled, its ._orig_mod"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), "the lazy parameter '0.weight' has no shape yet"),
    "hook of a gradient": (hooked, "a hook on the gradient of the parameter '0.weight'"),
    "inference": (inference, "the parameter '0.weight' was made in inference mode"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_no_replica_can_be_made_of(row):
    build, message = REFUSED[row]
    for make in (lambda model: FOMAML(model, LR, STEPS), FastModel):
        with pytest.raises(InputError, match=message):
            make(build())


def test_one_that_is_wrapped_later_is_refused_too():
    learner = FOMAML(plain(), LR, STEPS)
    learner.model = nn.DataParallel(learner.model)
    with pytest.raises(InputError, match="give the module that it wraps"):
        meta_gradient(learner, draw((6,), F.cross_entropy), engine="loop")


def test_a_scripted_function_is_no_matter():
    model = nn.Sequential(nn.Linear(6, 4), torch.jit.script(nn.Tanh())).double()
    assert meta_gradient(FOMAML(model, LR, STEPS), draw((6,), F.cross_entropy)).gradients


def test_adapted_copies_are_independent():
    """Also where functions that the module keeps know the module."""
    for build in MODULES:
        model, _ = twins(build)
        tasks = draw((6,), F.cross_entropy)
        own = FOMAML(model, LR, STEPS).adapt(one(tasks, 0).support)
        expected = own(tasks.query.inputs[0])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        torch.testing.assert_close(own(tasks.query.inputs[0]), expected, rtol=0, atol=0)
