"""compile=True: the rewritten meta-gradients against the slow loops of reference.py, and what a cache of them may miss."""

import gc
import time
import warnings
import weakref
from collections import Counter
from functools import partial
from threading import Lock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
import test_engines
from fomaml.adapt import SGD
from fomaml.algorithms import ANIL, FOMAML, MAML, MAMLPlusPlus, MetaSGD, Reptile
from fomaml.engines import choose, compiled, meta_gradient
from fomaml.engines.kernels import norm_relu_pool, norm_relu_pool_backward
from fomaml.engines.threads import side_by_side
from fomaml.errors import InputError
from fomaml.models import MLP, BatchNorm, Conv4, Conv4Strided
from fomaml.objectives import MultiStepLoss
from fomaml.tasks import Task
from test_engines import (
    ALGORITHMS,
    LR,
    MODULES,
    STEPS,
    answer,
    assert_agrees,
    conv_batch_norm,
    draw,
    error,
    example,
    rates,
)

# --- convolutional modules --------------------------------------------------------------------------


def block(into, out, *after, kernel=3, norm=nn.BatchNorm2d, **options):
    return [nn.Conv2d(into, out, kernel, **options), norm(out), *after]


def headed(features, *layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 4))


class Residual(nn.Module):
    """The output of the batch norm is used twice."""

    def __init__(self, relu=F.relu):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.again, self.norm_again = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)
        self.relu = relu

    def forward(self, inputs):
        skip = self.norm(self.conv(inputs))
        hidden = self.norm_again(self.again(self.relu(skip)))
        return self.head(self.relu(skip + hidden).mean((2, 3)))


class TwiceUsed(nn.Module):
    """The output of a ReLU goes into a pool and elsewhere."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.head = nn.Linear(10, 4)

    def forward(self, inputs):
        hidden = F.relu(self.norm(self.conv(inputs)))
        return self.head(torch.cat([F.max_pool2d(hidden, 2).mean((2, 3)), hidden.square().mean((2, 3))], 1))


class OtherPool(nn.Module):
    """The pool takes the ReLU of another layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.other = nn.Conv2d(2, 5, 3, padding=1)
        self.head = nn.Linear(10, 4)

    def forward(self, inputs):
        hidden = F.relu(self.norm(self.conv(inputs)))
        other = F.max_pool2d(F.relu(self.other(inputs)), 2)
        return self.head(torch.cat([hidden.mean((2, 3)), other.mean((2, 3))], 1))


class Indices(nn.Module):
    """Where the maxima were matters."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Linear(10, 4)

    def forward(self, inputs):
        hidden = F.relu(self.norm(self.conv(inputs)))
        pooled, where = F.max_pool2d(hidden, 2, return_indices=True)
        return self.head(torch.cat([pooled.mean((2, 3)), where.double().mean((2, 3)) / 9], 1))


class Tied(nn.Module):
    """One weight in two convolutions, and one layer called twice."""

    def __init__(self):
        super().__init__()
        self.into = nn.Conv2d(2, 4, 3, padding=1)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.first.weight
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, inputs):
        hidden = F.relu(self.norm(self.into(inputs)))
        hidden = F.max_pool2d(F.relu(self.norm(self.first(hidden))), 2)
        return self.head(F.relu(self.norm(self.second(hidden))).mean((2, 3)))


class Writes(nn.Module):
    """Writes through a view of an image: the image itself must see it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, inputs):
        hidden = F.relu(self.norm(self.conv(inputs))) * 1.5
        hidden.view(len(hidden), -1).mul_(2).add_(0.1)
        hidden[:, 1].mul_(0.5)
        return self.head(hidden.square().mean((2, 3)))


class Late(Writes):
    """Reads through a view an image that was written after it was taken."""

    def forward(self, inputs):
        hidden = F.relu(self.norm(self.conv(inputs))) * 1.5
        flat = hidden.view(len(hidden), -1)
        hidden.mul_(2).relu_()
        return self.head(flat.square().unflatten(1, (4, -1)).mean(2))


def frozen_conv():
    model = headed(4 * 16, *block(2, 4, nn.ReLU()), *block(4, 4, nn.ReLU(), nn.MaxPool2d(2)))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return model


class Pixels(nn.Module):
    """A convolution with an own view of its weight and of its inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 2, 4) / 4)  # height, width, in, out
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, inputs):
        images = inputs.transpose(2, 3).flip(1)[..., 1:, :]
        hidden = F.conv2d(images, self.weight.permute(3, 2, 0, 1))
        return self.head(F.relu(self.norm(hidden)).permute(0, 2, 3, 1).reshape(len(inputs), -1, 4).mean(1))


RELU, POOL = nn.ReLU(), nn.MaxPool2d(2)
# name → (builder, images' shape, fused blocks per forward pass in a first-order gradient)
CONVOLUTIONS = {
    "conv4": (partial(Conv4, 4, channels=4, image=(2, 17, 19)), (2, 17, 19), 4),
    "conv4-no-scale": (partial(Conv4, 4, channels=4, image=(2, 16, 16), scale=False), (2, 16, 16), 4),
    "conv4-running": (partial(Conv4Strided, 4, channels=4, in_channels=2, statistics="running"), (2, 9, 9), 4),
    "group-norm": (lambda: headed(4 * 9, *block(2, 4, RELU, POOL, norm=partial(nn.GroupNorm, 2))), (2, 8, 8), 0),
    "batch-norm": (lambda: headed(4 * 9, *block(2, 4, RELU, POOL)), (2, 8, 8), 1),
    "no-statistics": (
        lambda: headed(36, *block(2, 4, RELU, POOL, norm=partial(nn.BatchNorm2d, track_running_stats=False))),
        (2, 8, 8),
        1,
    ),
    "not-affine": (
        lambda: headed(36, *block(2, 4, RELU, POOL, norm=partial(nn.BatchNorm2d, affine=False))),
        (2, 8, 8),
        1,
    ),
    "own-norm": (lambda: headed(36, *block(2, 4, RELU, POOL, norm=BatchNorm)), (2, 8, 8), 1),
    "in-place": (
        lambda: headed(16, *block(2, 4, nn.ReLU(True), POOL), *block(4, 4, nn.ReLU(True), padding=1, stride=2)),
        (2, 8, 8),
        2,
    ),
    "residual": (Residual, (2, 6, 6), 0),
    "no-relu": (lambda: headed(36, *block(2, 4, POOL)), (2, 8, 8), 0),
    "pool-first": (lambda: headed(36, *block(2, 4, POOL, RELU)), (2, 8, 8), 0),
    "relu-first": (lambda: headed(36, nn.Conv2d(2, 4, 3), RELU, nn.BatchNorm2d(4), POOL), (2, 8, 8), 0),
    "leaky": (lambda: headed(36, *block(2, 4, nn.LeakyReLU(), POOL)), (2, 8, 8), 0),
    "pool-3": (lambda: headed(16, *block(2, 4, RELU, nn.MaxPool2d(3))), (2, 8, 8), 1),
    "pool-overlaps": (lambda: headed(4 * 25, *block(2, 4, RELU, nn.MaxPool2d(2, 1))), (2, 8, 8), 1),
    "pool-padded": (lambda: headed(4 * 16, *block(2, 4, RELU, nn.MaxPool2d(2, padding=1))), (2, 8, 8), 1),
    "pool-ceil": (lambda: headed(36, *block(2, 4, RELU, nn.MaxPool2d(2, ceil_mode=True))), (2, 7, 7), 1),
    "pool-dilated": (lambda: headed(16, *block(2, 4, RELU, nn.MaxPool2d(2, 2, dilation=2))), (2, 7, 7), 1),
    "average": (lambda: headed(36, *block(2, 4, RELU, nn.AvgPool2d(2))), (2, 8, 8), 1),
    "two-pools": (lambda: headed(16, *block(2, 4, RELU, POOL, POOL, padding=1)), (2, 8, 8), 1),
    "other-pool": (OtherPool, (2, 8, 8), 1),
    "twice-used": (TwiceUsed, (2, 6, 6), 1),
    "indices": (Indices, (2, 8, 8), 1),
    "dilated": (lambda: headed(36, *block(2, 4, RELU, POOL, dilation=2)), (2, 10, 10), 1),
    "grouped": (lambda: headed(36, *block(2, 4, RELU, POOL, groups=2)), (2, 8, 8), 1),
    "depthwise": (lambda: headed(36, nn.Conv2d(2, 4, 1), *block(4, 4, RELU, POOL, groups=4)), (2, 8, 8), 1),
    "one-by-one": (lambda: headed(64, *block(2, 4, RELU, POOL, kernel=1)), (2, 8, 8), 1),
    "transposed": (
        lambda: headed(36, nn.ConvTranspose2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), RELU, nn.MaxPool2d(3)),
        (2, 4, 4),
        1,
    ),
    "plain": (lambda: headed(36, nn.Conv2d(2, 4, 3), RELU, POOL), (2, 8, 8), 0),
    "norm-first": (lambda: headed(36, nn.BatchNorm2d(2), RELU, nn.Conv2d(2, 4, 3), POOL), (2, 8, 8), 1),
    "tied": (Tied, (2, 6, 6), 3),
    "frozen": (frozen_conv, (2, 12, 12), 2),
    "writes": (Writes, (2, 6, 6), 0),  # left as they are
    "late": (Late, (2, 6, 6), 0),
    "pixels": (Pixels, (2, 7, 6), 1),
}
SOME = {
    "fomaml": (FOMAML, reference.fomaml),
    "maml": (MAML, reference.maml),
    "reptile": (Reptile, reference.reptile),
}


def convolutional(name):
    build, shape, blocks = CONVOLUTIONS[name]
    torch.manual_seed(1)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)  # negative ones too
            nn.init.normal_(module.bias)
    return model, draw(shape, F.cross_entropy), blocks


def untouched(monkeypatch):
    """The graph runs as it was rewritten; the inductor takes 10 to 20 s."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *arguments: graph)


def graph(learner):
    """The one compiled graph of a learner."""
    [made] = compiled._functions[learner].values()
    return made._run.graph


def fused(learner):
    """How often each kernel stands in the rewritten graph."""
    targets = Counter(node.target for node in graph(learner).nodes)
    return targets[norm_relu_pool], targets[norm_relu_pool_backward]


def unchanged(model):
    """A function that checks that neither parameters nor buffers changed since."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check():
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    return check


def two_blocks():
    model = Conv4Strided(4, channels=6)
    del model.body[2:]
    return model


@pytest.mark.parametrize("algorithm", [n for n, row in ALGORITHMS.items() if row.modules("conv4-strided")])
def test_every_algorithm_agrees_with_the_reference(algorithm, monkeypatch):
    monkeypatch.setitem(MODULES, "conv4-strided", (two_blocks, (1, 7, 7), F.cross_entropy))
    monkeypatch.setattr(test_engines, "STEPS", 2)  # tracing takes long: a millisecond per operation
    model, tasks, criterion = example("conv4-strided")
    learner = ALGORITHMS[algorithm].learner(model, criterion)
    if isinstance(learner.objective, MultiStepLoss):
        with pytest.raises(InputError, match=r"compile=True does not take the multi-step loss"):
            meta_gradient(learner, tasks, engine="loop", compile=True)
        return
    expected = answer.__wrapped__(algorithm, "conv4-strided")
    check = unchanged(model)
    for _ in range(2):
        assert_agrees(meta_gradient(learner, tasks, engine="loop", compile=True), expected, 1e-10)
    check()
    assert fused(learner)[0] > 0


def slow_answer(slow, model, tasks, steps=2):
    return reference.over_tasks(
        lambda m, t: slow(m, t, F.cross_entropy, rates(reference.learned(m)), steps), model, tasks
    )


FEW = {"conv4", "conv4-running", "batch-norm", "residual", "frozen"}
CASES = [
    (module, algorithm)
    for module in CONVOLUTIONS
    for algorithm in SOME
    if algorithm == "fomaml" or (module in FEW if algorithm == "reptile" else "conv4" not in module)
]


@pytest.mark.parametrize(("module", "algorithm"), CASES)
def test_every_convolutional_module_agrees_with_the_reference(module, algorithm):
    model, tasks, blocks = convolutional(module)
    preset, slow = SOME[algorithm]
    learner = preset(model, LR, 2)
    expected = slow_answer(slow, model, tasks)
    check = unchanged(model)
    assert_agrees(meta_gradient(learner, tasks, engine="loop", compile=True), expected, 1e-10)
    check()
    if algorithm == "fomaml":
        assert fused(learner) == (3 * blocks, 3 * blocks)  # two inner steps and the query set


def test_pools_are_fused_where_they_can_be():
    for module, pooled in [("batch-norm", True), ("pool-3", False), ("in-place", True), ("indices", False)]:
        model, tasks, _ = convolutional(module)
        learner = FOMAML(model, LR, 1)
        meta_gradient(learner, tasks, engine="loop", compile=True)
        assert any(n.target is norm_relu_pool and n.args[-1] for n in graph(learner).nodes) == pooled, module
        left = torch.ops.aten.max_pool2d_with_indices.default
        assert any(node.target is left for node in graph(learner).nodes) != pooled, module


def test_other_dtypes_of_images_run_unfused():
    model, tasks, _ = convolutional("batch-norm")
    learner = FOMAML(model.bfloat16(), LR, 1)
    tasks = tasks.to(dtype=torch.bfloat16)
    result = meta_gradient(learner, tasks, engine="loop", compile=True)
    assert fused(learner) == (0, 0)
    assert_close(result, meta_gradient(learner, tasks, engine="loop"), 0.1)


def assert_close(found, expected, tolerance):
    """The gradients, in their norm over all parameters."""
    names = expected.gradients
    apart = sum((found.gradients[n].double() - expected.gradients[n].double()).square().sum() for n in names)
    size = sum(expected.gradients[n].double().square().sum() for n in names)
    assert (apart / size).sqrt() <= tolerance


@pytest.mark.parametrize("module", ["conv4", "conv4-no-scale", "in-place", "batch-norm"])
def test_float32_is_near_float64(module):
    model, tasks, _ = convolutional(module)
    expected = slow_answer(reference.fomaml, model, tasks)
    learner = FOMAML(model.float(), LR, 2)
    tasks = tasks.to(dtype=torch.float32)
    found = meta_gradient(learner, tasks, engine="loop", compile=True)
    assert all(gradient.dtype == torch.float32 for gradient in found.gradients.values())
    assert_close(found, expected, 1e-4)


def test_convolutions_under_vmap_agree_too():
    for module in ("batch-norm", "conv4-no-scale"):
        model, tasks, _ = convolutional(module)
        expected = slow_answer(reference.fomaml, model, tasks)
        for size in (None, 2):
            found = meta_gradient(
                FOMAML(model, LR, 2), tasks, engine="batched", tasks_at_once=size, compile=True
            )
            assert_agrees(found, expected, 1e-10)


# --- what changes between calls ---------------------------------------------------------------------


def assert_current(learner, tasks, **options):
    """The compiled result is that of an uncompiled run now."""
    found = meta_gradient(learner, tasks, compile=True, **options)
    expected = meta_gradient(learner, tasks, **options)
    assert error(found.gradients, expected.gradients) <= 1e-10
    return found


def made(learner):
    return len(compiled._functions[learner])


@pytest.fixture(params=["loop", "batched"])
def any_kind(request, monkeypatch):
    """A learner that runs fused, or one that goes to the inductor, here replaced; with its tasks and engine."""
    untouched(monkeypatch)
    if request.param == "loop":
        model, tasks, _ = convolutional("batch-norm")
    else:
        model, tasks, _ = example("mlp")
    return FOMAML(model, LR, 2), tasks, {"engine": request.param}


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
    assert_current(learner, tasks.map(lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 2 else tensor))
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
    for model, shape in [(nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 4)), (6,)), (None, (2, 8, 8))]:
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
    learner.first_order = lambda iteration: iteration < 5
    for iteration in (0, 5, 0):
        learner.iteration = iteration
        assert_current(learner, tasks, **options)


def test_follows_the_buffers(any_kind):
    learner, tasks, options = any_kind
    if options["engine"] == "loop":
        model = Conv4Strided(4, channels=3, in_channels=2, statistics="running").double().eval()
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


def test_forgets_learners_that_are_gone(any_kind):
    learner, tasks, options = any_kind
    meta_gradient(learner, tasks, compile=True, **options)
    gone = weakref.ref(learner)
    before = len(compiled._functions)
    del learner, any_kind
    gc.collect()
    assert gone() is None or len(gc.get_referrers(gone())) <= 2  # the fixture's own
    assert before >= len(compiled._functions)


# --- random numbers ---------------------------------------------------------------------------------


def dropped(convolutions):
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)] if convolutions else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 4)).double()


@pytest.mark.parametrize("convolutions", [True, False])
def test_dropout_draws_other_masks_at_each_call_and_for_each_task(convolutions, monkeypatch):
    untouched(monkeypatch)
    model = dropped(convolutions)
    tasks = draw((2, 8, 8) if convolutions else (36,), F.cross_entropy, tasks=1)
    tasks = tasks.map(lambda tensor: tensor.expand(4, *tensor.shape[1:]))  # four times the same
    learner = FOMAML(model, LR, 1)
    engine = "loop" if convolutions else "batched"
    before = torch.get_rng_state()
    first = meta_gradient(learner, tasks, engine=engine, compile=True)
    assert len(first.query_losses.unique()) == 4
    assert len(first.support_losses.unique()) == 4
    second = meta_gradient(learner, tasks, engine=engine, compile=True)
    assert not first.query_losses.eq(second.query_losses).any()
    torch.set_rng_state(before)
    again = meta_gradient(learner, tasks, engine=engine, compile=True)
    assert torch.equal(first.query_losses, again.query_losses)  # tracing drew nothing
    assert all(torch.equal(first.gradients[n], again.gradients[n]) for n in first.gradients)
    torch.set_rng_state(before)
    assert_agrees(first, meta_gradient(learner, tasks, engine=engine), 1e-10)  # the very same masks
    zeros = [meta_gradient(learner, tasks, engine=engine, compile=True).query_outputs for _ in range(50)]
    expected = torch.stack([meta_gradient(learner, tasks, engine=engine).query_outputs for _ in range(50)])
    assert (torch.stack(zeros).mean((0, 1)) - expected.mean((0, 1))).abs().max() < expected.std((0, 1)).max()


# --- threads ----------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_side_by_side_keeps_the_order_and_the_number_of_threads(threads):
    torch.set_num_threads(threads)
    try:
        lock, now, most, seen, drawn = Lock(), 0, 0, set(), []

        def work(i):
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
                seen.add(torch.get_num_threads())
            time.sleep(0.02 if i % 3 == 0 else 0.002)
            with lock:
                now -= 1
            return i * i

        def items():
            for i in range(20):
                drawn.append(i)
                yield i

        ahead = []
        found = []
        for result in side_by_side(work, items()):
            found.append(result)
            ahead.append(len(drawn) - len(found))
        assert found == [i * i for i in range(20)]
        assert most == threads
        assert max(ahead) <= threads  # what waits holds its memory
        assert seen == {1}
        assert torch.get_num_threads() == threads
        large = torch.randn(300, 300)
        torch.testing.assert_close(large @ large, (large.double() @ large.double()).float(), rtol=1e-3, atol=1e-3)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_side_by_side_of_few_items(number, two_threads):
    assert list(side_by_side(str, range(number))) == [str(i) for i in range(number)]


def test_side_by_side_raises_what_the_function_raised_and_goes_on_afterwards(two_threads):
    done = []

    def work(i):
        time.sleep(0.01)
        if i == 3:
            raise ValueError("three")
        done.append(i)
        return i

    found = []
    with pytest.raises(ValueError, match="three"):
        for result in side_by_side(work, range(50)):
            found.append(result)
    assert found == [0, 1, 2]
    number = len(done)
    time.sleep(0.1)
    assert len(done) == number <= 7  # nothing runs on
    assert torch.get_num_threads() == 2
    assert list(side_by_side(work, range(2))) == [0, 1]


def test_one_thread_and_two_give_the_same_bits():
    model = Conv4(4, channels=4, image=(2, 16, 16))
    tasks = draw((2, 16, 16), F.cross_entropy, tasks=5).to(dtype=torch.float32)
    learner = FOMAML(model, 0.1, 2)
    one = meta_gradient(learner, tasks, engine="loop", compile=True)
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            two = meta_gradient(learner, tasks, engine="loop", compile=True)
            assert all(torch.equal(one.gradients[n], two.gradients[n]) for n in one.gradients)
            assert all(torch.equal(a, b) for a, b in zip(one[1:4], two[1:4]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert made(learner) == 1


def test_random_numbers_are_drawn_in_the_order_of_the_tasks(two_threads):
    model = dropped(True)
    tasks = draw((2, 8, 8), F.cross_entropy, tasks=8)
    learner = FOMAML(model, LR, 2)
    results = []
    for compile in (False, True, True, True):
        torch.manual_seed(3)
        results.append(meta_gradient(learner, tasks, engine="loop", compile=compile))
    for result in results[1:]:
        assert_agrees(result, results[0], 1e-10)
