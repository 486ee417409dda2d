"""torch's transformer layers: fused kernels of theirs have no second derivative, and no or a slow rule for vmap."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from elsewhere import Elsewhere
from fomaml import FastModel, engines
from fomaml.engines import curve, meta_gradient
from fomaml.learning.algorithms import FOMAML, MAML, ProtoMAML, iMAML
from fomaml.tasks import Examples, Task

LR, STEPS = 0.1, 2


class Encoder(nn.Module):
    """Inputs (examples, 5, 8); in evaluation mode its layer has a fused kernel of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.layer(inputs).mean(1))


def made(training):
    labels = torch.arange(3).repeat(2).expand(4, -1)
    tasks = Task(*(Examples(torch.randn(4, 6, 5, 8).double(), labels) for _ in "ab"))
    return Encoder().double().train(training), tasks


def expected(algorithm, model, tasks, steps=STEPS):
    with sdpa_kernel(SDPBackend.MATH):
        return reference.over_tasks(
            lambda m, t: algorithm(m, t, F.cross_entropy, dict.fromkeys(reference.learned(m), LR), steps),
            model,
            tasks,
        )


def assert_same(found, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ["loop", "batched", "auto"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "algorithm"), [(FOMAML, reference.fomaml), (MAML, reference.maml)])
def test_a_transformer_layer_in_either_order_and_mode(make, algorithm, training, engine, recwarn):
    model, tasks = made(training)
    found = meta_gradient(make(model, LR, STEPS), tasks, engine=engine)
    assert_same(found.gradients, expected(algorithm, model, tasks).gradients)
    assert not [w for w in recwarn if "batching rule" in str(w.message)]


class Products(TorchDispatchMode):
    """The shapes of what is multiplied by what."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            self.seen.add(tuple(tuple(each.shape) for each in args[:2]))
        return function(*args, **(kwargs or {}))


def test_batched_copies_no_weight_for_each_token():
    """Each of the 4 tasks multiplies its 6 × 5 tokens by its weights at once, forward and backward."""
    model, tasks = made(True)
    with Products() as products:
        meta_gradient(FOMAML(model, LR, STEPS), tasks, engine="batched")
    assert ((4, 30, 8), (4, 8, 24)) in products.seen and ((4, 8, 30), (4, 30, 24)) in products.seen
    attention = 4 * 6 * 2  # tasks, examples, heads
    assert {shapes[0][0] for shapes in products.seen} == {4, attention}


@pytest.mark.long  # torch's compiler takes a quarter of a minute
def test_second_order_compiled():
    model, tasks = made(False)
    found = meta_gradient(MAML(model, LR, 1), tasks, engine="loop", compile=True)
    assert_same(found.gradients, expected(reference.maml, model, tasks, steps=1).gradients)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_the_implicit_gradient_differentiates_twice(engine):
    model, tasks = made(True)
    learner = iMAML(model, LR, STEPS, strength=5.0)
    found = meta_gradient(learner, tasks, engine=engine)
    with sdpa_kernel(SDPBackend.MATH):
        by_hand = learner(tasks)
        gradients = torch.autograd.grad(by_hand, list(model.parameters()))
    assert_same(found.gradients, dict(zip(found.gradients, gradients)))


@pytest.mark.parametrize("training", [True, False])
def test_a_start_from_features_of_a_transformer_layer(training):
    model, tasks = made(training)
    found = [
        meta_gradient(ProtoMAML(model, LR, STEPS, head="head"), tasks, engine=engine).gradients
        for engine in ("loop", "batched")
    ]
    assert_same(*found)


def test_evaluation_batched_takes_no_task_after_the_other(recwarn):
    model, tasks = made(False)
    learner = FOMAML(model, LR, STEPS)
    found, slow = (curve(learner, tasks, [0, 2], engine=engine) for engine in ("batched", "loop"))
    for (losses, outputs), (others, same) in zip(found, slow):
        torch.testing.assert_close(losses, others)
        torch.testing.assert_close(outputs, same)
    assert not [w for w in recwarn if "batching rule" in str(w.message)]


def test_a_fast_model_differentiates_through_attention():
    model, tasks = made(False)
    fast = FastModel(model, first_order=False)
    task = Task(*(Examples(*(tensor[0] for tensor in part)) for part in tasks))
    for _ in range(STEPS):
        fast.step(F.cross_entropy(fast(task.support.inputs), task.support.targets), LR)
    F.cross_entropy(fast(task.query.inputs), task.query.targets).backward()
    only = Task(*(Examples(*(tensor[:1] for tensor in part)) for part in tasks))
    by_hand = expected(reference.maml, model, only)
    assert_same({name: p.grad for name, p in model.named_parameters()}, by_hand.gradients)


def test_the_users_choice_of_kernels_is_left():
    model, tasks = made(True)
    torch.backends.mha.set_fastpath_enabled(True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        meta_gradient(FOMAML(model, LR, STEPS), tasks, engine="batched")
        assert torch.backends.mha.get_fastpath_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["on a CPU", "elsewhere"])
@pytest.mark.parametrize(
    ("make", "engine", "written_out"),
    [(FOMAML, "batched", True), (MAML, "batched", True), (MAML, "loop", True), (FOMAML, "loop", False)],
)
def test_a_stack_and_second_order_have_no_fused_attention_on_any_device(make, engine, written_out, elsewhere):
    """A GPU's memory-efficient kernel under vmap lacks what its backward pass needs; flash is for one task alone."""
    seen = set()

    class Watched(nn.Linear):
        def forward(self, inputs):
            own = torch.backends.cuda
            seen.add((own.math_sdp_enabled(), own.flash_sdp_enabled(), own.mem_efficient_sdp_enabled()))
            return super().forward(inputs)

    model = Watched(4, 3)
    tasks = Task(*(Examples(torch.randn(2, 5, 4), torch.arange(5).expand(2, 5) % 3) for _ in "ab"))
    with Elsewhere() if elsewhere else contextlib.nullcontext() as machine:
        if machine is not None:
            model, tasks = model.to(machine.device), tasks.to(machine.device)
        own = engines.plan(make(model, 0.1, 1), tasks, engine=engine)
        seen.clear()  # of the trial before
        own(tasks)
    assert seen == {(True, False, False) if written_out else (True, True, True)}
