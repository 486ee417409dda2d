from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from family import error
from fomaml.engines import meta_gradient
from fomaml.errors import InputError
from fomaml.learning.adapt import SGD, Adam, FastModel, Sign, inner_loop, load
from fomaml.learning.algorithms import FOMAML, MAML
from fomaml.models import MLP
from fomaml.tasks import count, one
from zoo import User, draw

LR = 0.1


def problem():
    """(losses of inner_loop, φ₀): a smooth non-convex loss of two parameters, and one it ignores."""
    torch.manual_seed(3)
    inputs, targets = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    start = {"w": torch.randn(4, 3), "b": torch.randn(3), "unused": torch.randn(2)}

    def losses(point, constant, step):
        return F.mse_loss((inputs @ point["w"] + point["b"]).tanh(), targets)

    return losses, {name: tensor.double() for name, tensor in start.items()}


def adapted(ours, steps, rates=None, first_order=True):
    losses, start = problem()
    path = inner_loop(
        losses,
        start,
        lambda step: rates or dict.fromkeys(start, LR),
        optimizer=ours,
        first_order=first_order,
    )
    for _ in range(steps):
        point, _ = next(path)
    return point


OPTIMISERS = [
    (SGD(), torch.optim.SGD, {}),
    (SGD(weight_decay=0.3), torch.optim.SGD, {"weight_decay": 0.3}),
    (SGD(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
    (SGD(0.9, True, 0.2), torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2}),
    (Adam(), torch.optim.Adam, {}),
    (Adam((0.0, 0.999)), torch.optim.Adam, {"betas": (0.0, 0.999)}),
    (
        Adam((0.5, 0.7), 1e-2, 0.3),
        torch.optim.Adam,
        {"betas": (0.5, 0.7), "eps": 1e-2, "weight_decay": 0.3},
    ),
    (Adam(weight_decay=0.3, decoupled=True), torch.optim.AdamW, {"weight_decay": 0.3}),
    (Sign(), reference.SignSGD, {}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), OPTIMISERS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_inner_optimisers_are_those_of_torch(ours, theirs, options, steps):
    losses, start = problem()
    own = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    optimizer = theirs([{"params": [p], "lr": LR} for p in own.values()], **options)
    for step in range(steps):
        optimizer.zero_grad()
        losses(own, False, step).backward()
        optimizer.step()
    found = adapted(ours, steps)
    for name, parameter in own.items():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=1e-13)
    assert (found["w"] - start["w"]).abs().max() > 1e-3  # it moved


@pytest.mark.parametrize(
    ("ours", "theirs"), [(SGD(momentum=0.9), partial(torch.optim.SGD, momentum=0.9)), (Adam(), torch.optim.Adam)],
    ids=["momentum", "adam"],
)  # fmt: skip
def test_a_parameter_that_joins_late_starts_its_own_state(ours, theirs):
    """torch.optim keeps the state by parameter: b is first used at step 2."""
    losses, start = problem()

    def late(point, constant, step):
        return losses({**point, "b": point["b"] if step >= 2 else 0.0}, constant, step)

    own = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    optimizer = theirs(own.values(), lr=LR)
    for step in range(4):
        optimizer.zero_grad()
        late(own, True, step).backward()
        optimizer.step()
    path = inner_loop(late, start, lambda step: dict.fromkeys(start, LR), optimizer=ours)
    for _ in range(4):
        point, _ = next(path)
    for name, parameter in own.items():
        torch.testing.assert_close(point[name], parameter.detach(), rtol=0, atol=1e-13)


def test_rates_are_asked_for_by_step_and_may_be_tensors():
    losses, start = problem()
    sizes = [
        {"w": torch.full((4, 3), 0.1 * k, dtype=torch.float64), "b": 0.2, "unused": 1.0} for k in range(3)
    ]
    path = inner_loop(losses, start, sizes.__getitem__)
    w, b = start["w"], start["b"]
    for k in range(3):
        w, b = w.detach().requires_grad_(), b.detach().requires_grad_()
        loss = losses({"w": w, "b": b}, True, k)
        by_w, by_b = torch.autograd.grad(loss, [w, b])
        w, b = w - 0.1 * k * by_w, b - 0.2 * by_b
        point, reported = next(path)
        assert reported.item() == pytest.approx(loss.item(), rel=1e-14) and not reported.requires_grad
    torch.testing.assert_close(point["w"], w, rtol=0, atol=1e-14)
    torch.testing.assert_close(point["b"], b, rtol=0, atol=1e-14)
    assert point["unused"] is start["unused"]


@pytest.mark.parametrize("first_order", [True, False])
def test_first_order_holds_the_gradient_constant_and_second_order_does_not(first_order):
    losses, start = problem()
    start = {name: tensor.requires_grad_() for name, tensor in start.items()}
    path = inner_loop(losses, start, lambda step: dict.fromkeys(start, LR), first_order=first_order)
    with torch.no_grad():  # whatever the mode of the caller while it adapts
        point = next(path)[0] if first_order else None
    if first_order:
        assert not point["w"].requires_grad
        path = inner_loop(losses, start, lambda step: dict.fromkeys(start, LR))
    point, _ = next(path)
    [by_w] = torch.autograd.grad(point["w"].sum(), [start["w"]])
    assert torch.equal(by_w, torch.ones(4, 3, dtype=torch.float64)) == first_order


@pytest.mark.parametrize("optimizer", [Adam(), Sign()], ids=["Adam", "Sign"])
@pytest.mark.parametrize("first_order", [False, lambda iteration: iteration < 3], ids=["never", "at first"])
def test_optimisers_of_first_order_refuse_second_order(optimizer, first_order):
    with pytest.raises(InputError) as raised:
        FOMAML(MLP(2, 2), LR, 1, optimizer=optimizer, first_order=first_order)
    assert str(raised.value) == (
        f"the inner optimiser {type(optimizer).__name__} is first order only; "
        "use SGD inside, or first_order=True"
    )


def test_nesterov_needs_momentum():
    with pytest.raises(InputError, match="nesterov needs a momentum above 0, got 0"):
        SGD(nesterov=True)


# --- FastModel ------------------------------------------------------------------------------------


def by_hand(model, tasks, first_order, steps=3, lr=LR):
    for i in range(count(tasks)):
        task, fast = one(tasks, i), FastModel(model, first_order)
        for _ in range(steps):
            fast.step(F.cross_entropy(fast(task.support.inputs), task.support.targets), lr)
        (F.cross_entropy(fast(task.query.inputs), task.query.targets) / count(tasks)).backward()


@pytest.mark.parametrize("preset", [FOMAML, MAML])
@pytest.mark.parametrize("build", [partial(MLP, 6, 8, 4), User], ids=["mlp", "user"])
def test_a_loop_by_hand_equals_meta_gradient(preset, build):
    model, tasks = build().double(), draw((6,), F.cross_entropy)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = meta_gradient(preset(model, LR, 3), tasks, engine="loop").gradients
    by_hand(model, tasks, first_order=preset is FOMAML)
    found = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.learned(model).items()
    }
    assert error(found, expected) <= 1e-14
    for name, tensor in model.state_dict().items():  # neither parameters nor buffers have changed
        assert torch.equal(tensor, state[name])


def test_steps_by_name_leave_the_others_where_they_are():
    model, tasks = MLP(6, 8, 4).double(), draw((6,), F.cross_entropy)
    rates = {"3.weight": 0.3, "3.bias": torch.full((4,), 0.1, dtype=torch.float64)}
    expected = meta_gradient(
        FOMAML(model, {"*weight": 0.3, "*": 0.1}, 3, adapted="3.*"), tasks, engine="loop"
    ).gradients
    by_hand(model, tasks, first_order=True, lr=rates)
    found = {n: p.grad for n, p in model.named_parameters()}
    assert error(found, expected) <= 1e-14


def test_the_wrapper_has_no_parameters_and_takes_any_arguments():
    class Scaled(nn.Linear):
        def forward(self, inputs, *, by):
            return super().forward(inputs) * by

    model = Scaled(3, 2)
    fast = FastModel(model)
    assert list(fast.parameters()) == []
    inputs = torch.randn(4, 3)
    assert torch.equal(fast(inputs, by=2.0), model(inputs, by=2.0))


def test_module_is_independent():
    model = User()
    inputs, targets = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    fast = FastModel(model)
    fast.step(F.cross_entropy(fast(inputs), targets), LR)
    copied = fast.module()
    assert type(copied) is User and copied.first.weight is copied.second.weight
    assert isinstance(copied.head.weight, nn.Parameter) and copied.head.weight.is_leaf
    for name, parameter in copied.named_parameters():
        expected = fast.weights.get(name, model.frozen)
        assert torch.equal(parameter, expected), name
    before = model.head.weight.clone()
    with torch.no_grad():
        copied.head.weight.zero_()
    assert torch.equal(model.head.weight, before)
    assert fast.weights["head.weight"].abs().max() > 0


def test_errors_of_fast_model():
    fast = FastModel(nn.Linear(3, 2))
    loss = fast(torch.ones(1, 3)).sum()
    with pytest.raises(InputError) as raised:
        fast.step(loss, {"head": 0.1})
    assert str(raised.value) == "no parameter 'head' to adapt; there are: weight, bias"


def test_load_copies_in_place_and_resizes_a_head():
    model = nn.Sequential(nn.Linear(3, 2))
    own = model[0].weight
    value = torch.randn(2, 3)
    assert load(model, {"0.weight": value}, {}) is model
    assert model[0].weight is own and torch.equal(own, value)
    load(model, {"0.weight": torch.ones(5, 3), "0.bias": torch.zeros(5)}, {})
    assert model[0].out_features == 5
    assert model(torch.ones(1, 3)).tolist() == [[3.0] * 5]
