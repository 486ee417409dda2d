"""A criterion of one's own is a part of the task: what it holds of the module, what it recomputes, its own buffers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fomaml.engines import curve, meta_gradient
from fomaml.errors import InputError
from fomaml.learning.algorithms import FOMAML
from fomaml.tasks import one
from zoo import draw

LR, STEPS = 0.1, 2


def made():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def again(function, *arguments):
    return checkpoint(function, *arguments, use_reentrant=False)


def plainly(function, *arguments):
    return function(*arguments)


class Holding(nn.Module):
    """Holds the model as a part, and recomputes its term."""

    def __init__(self, model, run):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, outputs, targets):
        return self.run(
            lambda o: (
                F.cross_entropy(o, targets) + 0.1 * self.model[0].weight.square().sum() * o.sum().sigmoid()
            ),
            outputs,
        )


def closure(model, run):
    def criterion(outputs, targets):
        def term(o):
            return F.cross_entropy(o, targets) + 0.1 * model[0].weight.square().sum() * o.sum().sigmoid()

        return run(term, outputs)

    return criterion


def by_parameters(model, run):
    """Knows the parameters and not the module."""
    parameters = list(model.parameters())

    def criterion(outputs, targets):
        return run(
            lambda o: F.cross_entropy(o, targets) + 0.1 * sum(p.square().sum() for p in parameters), outputs
        )

    return criterion


def method(model, run):
    return Holding(model, run).forward


FORMS = [Holding, closure, by_parameters, method]


def descended(model, task, criterion_of):
    """(a copy after the inner steps, its criterion), the plainest way."""
    own = copy.deepcopy(model)
    criterion = criterion_of(own)
    for _ in range(STEPS):
        loss = criterion(own(task.support.inputs), task.support.targets)
        slopes = torch.autograd.grad(loss, list(own.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(own.parameters(), slopes):
                parameter -= LR * slope
    return own, criterion


def by_copies(criterion_of, tasks, model):
    """FOMAML on copies, with a criterion of each copy."""
    total: dict = dict.fromkeys(dict(model.named_parameters()), 0.0)
    for index in range(3):
        task = one(tasks, index)
        own, criterion = descended(model, task, criterion_of)
        loss = criterion(own(task.query.inputs), task.query.targets)
        slopes = torch.autograd.grad(loss, list(own.parameters()))
        total = {name: total[name] + slope / 3 for name, slope in zip(total, slopes)}
    return total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("run", "engine"), [(again, "loop"), (plainly, "loop"), (plainly, "batched"), (plainly, "auto")]
)
def test_what_it_knows_of_the_module_is_the_tasks(form, run, engine):
    model, tasks = made(), draw((6,), F.cross_entropy)
    learner = FOMAML(model, LR, STEPS, form(model, run))
    expected = by_copies(lambda own: form(own, plainly), tasks, model)
    found = meta_gradient(learner, tasks, engine=engine).gradients
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_second_order_with_what_it_recomputes(form):
    model, tasks = made(), draw((6,), F.cross_entropy)
    learners = [FOMAML(model, LR, STEPS, form(model, run), first_order=False) for run in (again, plainly)]
    found, expected = (meta_gradient(learner, tasks, engine="loop").gradients for learner in learners)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


class Counting(nn.Module):
    def __init__(self, assigns):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.assigns = assigns

    def forward(self, outputs, targets):
        if self.assigns:
            self.calls = self.calls + 1
        else:
            self.calls.add_(1)
        return F.cross_entropy(outputs, targets) * (1 + 0.1 * self.calls.clone())


@pytest.mark.parametrize("assigns", [True, False])
@pytest.mark.parametrize("engine", ["loop", "batched", "auto"])
def test_its_buffers_are_each_tasks_own(assigns, engine):
    model, tasks = made(), draw((6,), F.cross_entropy)
    learner = FOMAML(model, LR, STEPS, Counting(assigns))
    expected = []
    for index in range(3):
        task = one(tasks, index)
        own, criterion = descended(model, task, lambda own: Counting(assigns))
        expected.append(criterion(own(task.query.inputs), task.query.targets).detach())
    for _ in range(2):
        found = meta_gradient(learner, tasks, engine=engine)
        torch.testing.assert_close(found.query_losses, torch.stack(expected), rtol=1e-10, atol=0)
        [(losses, _)] = curve(learner, tasks, [STEPS], engine=engine)
        torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-10, atol=0)
    assert learner.criterion.calls == 0
    assert set(learner.adapt(one(tasks, 0).support).state_dict()) == set(model.state_dict())


# --- hooks of the backward pass -------------------------------------------------------------------


def of_a_tensor(model):
    class Turned(nn.Sequential):
        def forward(self, inputs):
            hidden = self[0](inputs)
            hidden.register_hook(lambda slope: -slope)
            return self[2](hidden.tanh())

    return Turned(*model)


def of_a_layer(model):
    model[2].register_full_backward_hook(lambda layer, into, out: (into[0] * 0.5,))
    return model


def before_a_layer(model):
    model[2].register_full_backward_pre_hook(lambda layer, out: (out[0].clamp(-0.01, 0.01),))
    return model


HOOKS = [of_a_tensor, of_a_layer, before_a_layer]


@pytest.mark.parametrize("hooked", HOOKS)
def test_a_hook_of_the_backward_pass_runs_or_is_refused(hooked):
    """Also one that is not linear: it sees the gradient that a task has alone."""
    model, tasks = hooked(made()), draw((6,), F.cross_entropy)
    learner = FOMAML(model, LR, STEPS)
    total = by_copies(lambda own: F.cross_entropy, tasks, model)
    for engine in ("loop", "auto"):
        found = meta_gradient(learner, tasks, engine=engine)
        assert found.engine == "loop"
        for name, gradient in total.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-10, atol=1e-12)
    for engine in ("batched", "factored"):
        with pytest.raises(
            InputError, match="hook of the backward pass, which does not run under vmap: engine='loop'"
        ):
            meta_gradient(learner, tasks, engine=engine)


# --- what forward keeps ---------------------------------------------------------------------------


class Keeping(nn.Module):
    """Counts in a dict and in a list, and fills a buffer that was None."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = nn.Linear(6, 4), kind
        self.state, self.log = {"calls": 0}, []
        self.register_buffer("cache", None)

    def forward(self, inputs):
        self.state["calls"] += 1
        self.log.append(inputs.mean())
        if self.kind == "buffer":
            if self.cache is None:
                self.cache = inputs.detach().mean()
            return self.layer(inputs) * (1 + self.cache)
        return self.layer(inputs) * (self.state["calls"] + len(self.log))


@pytest.mark.parametrize("kind", ["buffer", "containers"])
def test_what_forward_keeps_does_not_go_from_task_to_task(kind):
    torch.manual_seed(1)
    learner, tasks = FOMAML(Keeping(kind).double(), LR, STEPS), draw((6,), F.cross_entropy)
    expected = [curve(learner, tasks.map(lambda t, i=i: t[i : i + 1]), [0, STEPS])[1][0][0] for i in range(3)]
    for engine in ("loop", "batched", "auto"):
        for _ in range(2):
            found = curve(learner, tasks, [0, STEPS], engine=engine)[1][0]
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=0)
            losses = meta_gradient(learner, tasks, engine=engine).query_losses
            torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-10, atol=0)
    assert learner.model.state == {"calls": 0} and learner.model.log == [] and learner.model.cache is None
    if kind == "buffer":
        support = one(tasks, 0).support
        torch.testing.assert_close(learner.adapt(support).cache, support.inputs.mean())
