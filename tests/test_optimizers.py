"""The fused form of torch's optimisers is taken where nothing speaks against it, and gives the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fomaml
from fomaml.engines import _torch
from fomaml.optimizers import Steps, fuse
from fomaml.train import measured_by_default
from moved_names import broken, gone

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def tasks():
    return fomaml.RegressionEpisodes(fomaml.data.synthetic.Sinusoids(), shots=3, query_shots=3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_steps_are_those_of_a_loop_by_hand(name):
    torch.manual_seed(0)
    learner = fomaml.FOMAML(fomaml.MLP(1, 8, 1).double(), 0.1, 2, F.mse_loss)
    own = fomaml.FOMAML(fomaml.MLP(1, 8, 1).double(), 0.1, 2, F.mse_loss)
    own.load_state_dict(learner.state_dict())
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = OPTIMIZERS[name](learner.parameters())
        for _ in fomaml.train(learner, tasks(), optimizer, iterations=5, meta_batch_size=2):
            pass
        assert all(group["fused"] for group in optimizer.param_groups)
        by_hand = OPTIMIZERS[name](own.parameters())
        for number in range(5):
            fomaml.meta_gradient(own, tasks().batch(2 * number, 2)).apply_to(own)
            by_hand.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert not any(group["fused"] for group in by_hand.param_groups)
    for found, expected in zip(learner.parameters(), own.parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_is_not_fused():
    parameter = nn.Parameter(torch.ones(2))
    dense, sparse = torch.ones(2), torch.ones(2).to_sparse()
    complex_ = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    stepped = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(2)
    stepped.step()
    for optimizer, gradient in [
        (torch.optim.Adam([parameter], foreach=True), dense),
        (torch.optim.Adam([parameter], fused=False), dense),
        (torch.optim.Adam([parameter]), sparse),
        (torch.optim.Adam([parameter], lr=torch.tensor(0.1)), dense),
        (torch.optim.Adam([complex_]), dense),
        (torch.optim.RMSprop([parameter]), dense),
        (stepped, dense),
    ]:
        fuse(optimizer, [gradient])
        assert not optimizer.param_groups[0].get("fused"), optimizer


ADAMS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(
        p, lr=0.01, amsgrad=True, weight_decay=0.1, maximize=True, fused=True
    ),
    "adamw": lambda p: torch.optim.AdamW(
        p, lr=0.01, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1, fused=True
    ),
    "groups": lambda p: torch.optim.Adam(
        [{"params": [p[0]], "lr": 0.1}, {"params": p[1:]}], lr=0.01, fused=True
    ),
}


def pair(name):
    """Two optimisers of their own equal parameters."""
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    parameters = [[nn.Parameter(values.clone()), nn.Parameter(values[0].clone())] for _ in range(2)]
    return [ADAMS[name](own) for own in parameters]


def of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def stepped(optimizer, step, number=4):
    """With the gradients of so many steps."""
    drawn = torch.Generator().manual_seed(1)
    for _ in range(number):
        for parameter in filter(lambda own: own.requires_grad, of(optimizer)):
            parameter.grad = torch.randn(parameter.shape, generator=drawn)
        step()


@pytest.fixture
def calls(monkeypatch):
    """The calls of `step` of torch's Adams."""
    found = []
    own_steps = {kind: kind.step for kind in (torch.optim.Adam, torch.optim.AdamW)}  # one since torch 2.7
    for kind, own in own_steps.items():

        def step(self, *arguments, own=own, **options):
            found.append(self)
            return own(self, *arguments, **options)

        monkeypatch.setattr(kind, "step", step)
    return found


@pytest.mark.parametrize("name", ADAMS)
def test_a_kernel_alone_steps_as_the_optimiser_does(name, calls):
    one, other = pair(name)
    stepped(one, one.step)
    calls.clear()
    stepped(other, Steps(other).take)
    assert len(calls) == 1  # the first, which makes what is kept
    for found, expected in zip(of(other), of(one)):
        assert torch.equal(found, expected)
        assert found.grad is not None
        for key, value in one.state[expected].items():
            assert torch.equal(other.state[found][key], value), key


def hooked(optimizer):
    optimizer.register_step_post_hook(lambda *_: None)


def hooked_everywhere(optimizer):
    return register_optimizer_step_pre_hook(lambda *_: None)


def scheduled(optimizer):
    optimizer.scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def with_a_tensor(optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)


def without_a_gradient(optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2), requires_grad=False)]})


def decoupled_in_part(optimizer):
    added = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer.add_param_group({"params": [added], "decoupled_weight_decay": True})
    added.grad = torch.ones(2)


def scaled(optimizer):
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)


def unfused(optimizer):
    optimizer.param_groups[0]["fused"] = False


CHANGES = [
    hooked,
    hooked_everywhere,
    scheduled,
    with_a_tensor,
    without_a_gradient,
    decoupled_in_part,
    scaled,
    unfused,
]


@pytest.mark.parametrize("change", CHANGES)
def test_all_else_goes_by_the_optimiser_itself(change, calls):
    one, other = pair("adam")
    for own, take in ((one, lambda: one.step()), (other, Steps(other).take)):
        stepped(own, take, 2)
        calls.clear()
        handle = change(own)
        stepped(own, take, 2)
        if handle is not None:
            handle.remove()
        assert len(calls) == 2
    for found, expected in zip(of(other), of(one)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "name", [name for name, without in _torch.NAMES.items() if without == _torch.STEPPING]
)
def test_where_torch_has_moved_a_name_the_optimiser_steps_itself(name, monkeypatch):
    one, other = pair("adam")
    stepped(one, one.step)
    hindrance = gone if "hooks" in name else broken
    hindrance(name, monkeypatch)
    stepped(other, Steps(other).take)
    for found, expected in zip(of(other), of(one)):
        assert torch.equal(found, expected)
        assert torch.equal(other.state[found]["step"], one.state[expected]["step"])


def test_how_often_a_training_is_measured_by_default():
    found = {number: measured_by_default(number) for number in (1, 4, 25, 100, 900, 1000, 60_000)}
    assert found == {1: 1, 4: 1, 25: 2, 100: 10, 900: 10, 1000: 10, 60_000: 600}
