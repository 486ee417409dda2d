"""compile=True: rewritten meta-gradients against the slow loops of reference.py, and what a cache of them may miss."""

import copy
import gc
import time
import warnings
import weakref
from collections import Counter
from functools import partial
from threading import Barrier, Lock
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import family
import reference
from family import ALGORITHMS, EXECUTIONS, LR, answer, assert_agrees, error, rates
from fomaml.engines import meta_gradient
from fomaml.engines.compiled import products, trace
from fomaml.engines.cpu import fusion, kernels, lifted
from fomaml.engines.cpu.kernels import norm_relu_pool, norm_relu_pool_backward
from fomaml.engines.cpu.threads import one_by_one, side_by_side
from fomaml.engines.plan import ENGINES, _at_once
from fomaml.errors import InputError
from fomaml.learning.adapt import SGD
from fomaml.learning.algorithms import FOMAML, MAML, Reptile, iMAML
from fomaml.learning.objectives import MultiStepLoss
from fomaml.models import BatchNorm, Conv4, Conv4Strided
from fomaml.tasks import Task
from zoo import MODULES, draw, example

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
    "conv4-running": (
        partial(Conv4Strided, 4, channels=4, in_channels=2, policy="running"),
        (2, 9, 9),
        4,
    ),
    "group-norm": (
        lambda: headed(4 * 9, *block(2, 4, RELU, POOL, norm=partial(nn.GroupNorm, 2))),
        (2, 8, 8),
        0,
    ),
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
        lambda: headed(
            16, *block(2, 4, nn.ReLU(True), POOL), *block(4, 4, nn.ReLU(True), padding=1, stride=2)
        ),
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
    "wide": (
        lambda: headed(
            32,
            *block(2, 16, RELU, padding=1),
            *block(16, 48, RELU, bias=False),
            *block(48, 32, RELU, stride=2),
        ),
        (2, 6, 5),
        3,
    ),
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


GRAPHS = WeakKeyDictionary()  # by what runs


@pytest.fixture(autouse=True)
def graphs_are_kept(monkeypatch):
    """What is compiled does not keep them."""

    def forward(graph):
        run = graph_forward(graph)
        GRAPHS[run] = graph
        return run

    graph_forward = trace._forward
    monkeypatch.setattr(trace, "_forward", forward)


def graph(learner):
    """The one compiled graph of a learner."""
    [(made, _)] = trace._watched[learner].known.values()
    return GRAPHS[made._run].graph


def targets(learner):
    """How often each function stands in the compiled graph."""
    return Counter(node.target for node in graph(learner).nodes)


def fused(learner):
    found = targets(learner)
    return found[norm_relu_pool], found[norm_relu_pool_backward]


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


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("algorithm", [n for n, row in ALGORITHMS.items() if row.modules("conv4-strided")])
def test_every_algorithm_agrees_with_the_reference(algorithm, engine, monkeypatch):
    monkeypatch.setitem(MODULES, "conv4-strided", (two_blocks, (1, 7, 7), F.cross_entropy))
    monkeypatch.setattr(family, "STEPS", 2)  # tracing takes long: a millisecond per operation
    model, tasks, criterion = example("conv4-strided")
    learner = ALGORITHMS[algorithm].learner(model, criterion)
    if isinstance(learner.objective, MultiStepLoss):
        with pytest.raises(InputError, match=r"compile=True does not take the multi-step loss"):
            meta_gradient(learner, tasks, engine=engine, compile=True)
        return
    expected = answer.__wrapped__(algorithm, "conv4-strided")
    check = unchanged(model)
    assert_agrees(meta_gradient(learner, tasks, engine=engine, compile=True), expected, 1e-10)
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


@pytest.mark.parametrize(
    ("module", "algorithm", "engine"),
    [(*case, "loop") for case in CASES]
    + [(*case, "batched") for case in CASES if case[1] == "fomaml" or case[0] in ("wide", "batch-norm")],
)
def test_every_convolutional_module_agrees_with_the_reference(module, algorithm, engine, monkeypatch):
    untouched(monkeypatch)
    model, tasks, blocks = convolutional(module)
    preset, slow = SOME[algorithm]
    learner = preset(model, LR, 2)
    expected = slow_answer(slow, model, tasks)
    check = unchanged(model)
    assert_agrees(meta_gradient(learner, tasks, engine=engine, compile=True), expected, 1e-10)
    check()
    if algorithm == "fomaml":
        stacks = engine == "batched" and module not in ("writes", "late", "pixels")
        assert (lifted.convolution in targets(learner)) == stacks
        if engine == "loop" or stacks:
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
    model, tasks, _ = convolutional("in-place")
    expected = slow_answer(reference.fomaml, model, tasks)
    for size in (None, 1):
        learner = FOMAML(model, LR, 2)
        found = meta_gradient(learner, tasks, engine="batched", tasks_at_once=size, compile=True)
        assert_agrees(found, expected, 1e-10)


# --- what changes between calls ---------------------------------------------------------------------


def assert_current(learner, tasks, **options):
    """The compiled result is that of an uncompiled run now."""
    found = meta_gradient(learner, tasks, compile=True, **options)
    expected = meta_gradient(learner, tasks, **options)
    assert error(found.gradients, expected.gradients) <= 1e-10
    return found


def made(learner):
    return len(trace._watched[learner].known)


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


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("change", CHANGES)
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
    function = trace._watched[learner]
    meta_gradient(learner, tasks, engine="loop")  # counts, which is no change
    meta_gradient(learner, tasks, engine=engine, compile=True)
    assert trace._watched[learner] is function
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


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_second_order_through_a_batch_norm_in_evaluation(engine, monkeypatch):
    untouched(monkeypatch)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), nn.GELU(), nn.Flatten(), nn.Linear(144, 4)]
    learner = MAML(nn.Sequential(*layers).double(), LR, 2)
    tasks = draw((2, 8, 8), F.cross_entropy, tasks=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = meta_gradient(learner, tasks, engine=engine, compile=True)
    assert_agrees(found, meta_gradient(learner, tasks, engine="loop"), 1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own, under vmap
@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_weight_norm_is_not_given_another_order(engine):
    norm = nn.utils.parametrizations.weight_norm
    layers = [
        norm(nn.Conv2d(2, 16, 3)),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        norm(nn.Conv2d(16, 16, 3)),
        nn.Flatten(),
    ]
    model = nn.Sequential(*layers, nn.Linear(256, 4)).double()
    tasks = draw((2, 8, 8), F.cross_entropy, tasks=3)
    found = meta_gradient(FOMAML(model, LR, 2), tasks, engine=engine, compile=True)
    assert_agrees(found, meta_gradient(FOMAML(model, LR, 2), tasks, engine="loop"), 1e-10)


def columns(first):
    return [
        nn.Conv2d(1, first, (2, 3), stride=(1, 5)),
        nn.ReLU(),
        nn.Conv2d(first, 1, 1),
        nn.Conv2d(1, 5, (2, 1)),
    ]


COLUMNS = {
    "torch's": columns(3),
    "the kernel's": columns(16),
    "transposed": [nn.Conv2d(2, 3, (2, 5)), nn.ReLU(), nn.ConvTranspose2d(3, 1, (2, 1))],
}


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("layers", COLUMNS.values(), ids=COLUMNS)
def test_columns_of_one_channel(engine, layers, monkeypatch):
    """torch 2.14 makes garbage of such convolutions when they are channels-last, on processors with AVX-512."""
    ordered = []

    def plain(images):
        ordered.append(images.shape)
        return kept(images)

    kept = kernels.plain
    monkeypatch.setattr(kernels, "plain", plain)
    monkeypatch.setattr(fusion, "plain", plain)
    channels = layers[0].in_channels
    size = nn.Sequential(*layers)(torch.zeros(1, channels, 12, 5)).numel()
    model = nn.Sequential(*copy.deepcopy(layers), nn.Flatten(), nn.Linear(size, 4))
    for _ in range(3):
        tasks = draw((channels, 12, 5), F.cross_entropy, tasks=4).to(dtype=torch.float32)
        learner = FOMAML(model, LR, 1)
        found = meta_gradient(learner, tasks, engine=engine, compile=True)
        assert ordered
        expected = meta_gradient(FOMAML(model, LR, 1), tasks, engine="loop")
        torch.testing.assert_close(found.query_losses, expected.query_losses, rtol=1e-4, atol=1e-5)
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_subtracted_masks_are_left(engine):
    class Marked(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.head = nn.Conv2d(2, 4, 3), nn.Linear(144, 4)

        def forward(self, inputs):
            dark = inputs[:, :1, :6, :6] < 0
            return self.head((self.into(inputs) - dark * 2.0 - dark.long() * 3).flatten(1))

    model, tasks = Marked().double(), draw((2, 8, 8), F.cross_entropy, tasks=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = meta_gradient(FOMAML(model, LR, 2), tasks, engine=engine, compile=True)
    assert_agrees(found, meta_gradient(FOMAML(model, LR, 2), tasks, engine="loop"), 1e-10)


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


class Noisy(nn.Module):
    """Noise on the inputs, which otherwise are the same at each inner step: `draw` is what makes it."""

    def __init__(self, draw):
        super().__init__()
        self.draw, self.layer = draw, nn.Linear(6, 4)

    def forward(self, inputs):
        return self.layer(inputs + self.draw(inputs))


@torch.library.custom_op("test_compiled::noise", mutates_args=())
def noise(like: torch.Tensor) -> torch.Tensor:
    """Without the tag that says so."""
    return torch.randn_like(like)


noise.register_fake(torch.empty_like)
noise.register_vmap(lambda info, axes, like: (torch.ops.test_compiled.noise(like), axes[0]))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("draw_noise", [torch.randn_like, torch.ops.test_compiled.noise])
def test_factors_see_noise_on_the_inputs(draw_noise, compile, monkeypatch):
    untouched(monkeypatch)
    learner, tasks = FOMAML(Noisy(draw_noise).double(), LR, 3), draw((6,), F.cross_entropy)

    def run(engine):
        meta_gradient(learner, tasks, engine=engine, compile=compile)  # compiled, then drawn for
        torch.manual_seed(5)
        return meta_gradient(learner, tasks, engine=engine, compile=compile)

    assert_agrees(run("factored"), run("batched"), 1e-10)


@pytest.mark.parametrize("noisy", [False, True])
def test_factors_of_the_same_inputs_are_kept_once(noisy, monkeypatch):
    untouched(monkeypatch)
    layer = nn.Linear(64, 32)
    if noisy:
        layer = nn.Sequential(nn.Dropout(0.5), layer)
    learner = FOMAML(layer.double(), LR, 3)
    meta_gradient(learner, draw((64,), F.cross_entropy), engine="factored", compile=True)
    joined = [node for node in graph(learner).nodes if node.target is torch.ops.aten.cat.default]
    assert bool(joined) is noisy


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
        torch.testing.assert_close(
            large @ large, (large.double() @ large.double()).float(), rtol=1e-3, atol=1e-3
        )
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


def test_the_caller_has_one_thread_while_tasks_run(two_threads):
    """What it does between two results must not wake helpers that spin on the cores of the tasks."""
    results = side_by_side(str, range(3))
    assert [torch.get_num_threads() for _ in results] == [1, 1, 1]
    assert torch.get_num_threads() == 2
    results = side_by_side(str, range(3))
    next(results)
    results.close()  # left alone half way
    assert torch.get_num_threads() == 2


def test_stacks_one_by_one_on_all_threads(two_threads):
    memory, threads = kernels.Memory(), []

    def work(i):
        threads.append((torch.get_num_threads(), kernels._own.memory))
        if i == 3:
            raise ValueError("three")
        return i

    results = one_by_one(work, range(3), memory)
    assert [(i, torch.get_num_threads()) for i in results] == [(0, 1), (1, 1), (2, 1)]
    assert threads == [(1, memory)] * 3
    assert torch.get_num_threads() == 2 and kernels._own.memory is None
    results = one_by_one(work, range(9), memory)
    next(results)
    results.close()  # left alone half way
    assert torch.get_num_threads() == 2 and kernels._own.memory is None
    with pytest.raises(ValueError, match="three"):
        list(one_by_one(work, range(9), memory))
    assert torch.get_num_threads() == 2 and kernels._own.memory is None


def test_the_memory_of_a_stack_does_not_grow_with_the_inner_steps():
    def kept(steps):
        learner = FOMAML(Conv4(4, channels=16, image=(2, 16, 16)), 0.1, steps)
        tasks = draw((2, 16, 16), F.cross_entropy, tasks=6).to(dtype=torch.float32)
        for _ in range(2):
            meta_gradient(learner, tasks, engine="batched", compile=True)
        [(function, _)] = trace._watched[learner].known.values()
        return sum(block.nbytes for free in function._memory._free.values() for block, _ in free)

    assert kept(8) <= 1.05 * kept(2) > 0


class TensorBytes(TorchDispatchMode):
    """The most bytes at a time of tensors made while it is on."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return found

    def count(self, storage):
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, address, size):
        self.storages.remove(address)
        self.now -= size


@pytest.mark.parametrize("preset", [FOMAML, MAML])
@pytest.mark.parametrize("build", [partial(Conv4, image=(2, 16, 16)), partial(Conv4Strided, in_channels=2)])
def test_the_tensors_of_a_loop_do_not_grow_with_the_inner_steps(build, preset):
    """But in second order, which shows that the measure sees them."""

    def peak(steps):
        learner = preset(build(4, channels=16), 0.1, steps)
        tasks = draw((2, 16, 16), F.cross_entropy).to(dtype=torch.float32)
        for _ in range(2):  # compiled, then measured
            with TensorBytes() as tensors:
                meta_gradient(learner, tasks, engine="loop", compile=True)
        return tensors.peak

    ratio = peak(8) / peak(2)
    assert ratio <= 1.05 if preset is FOMAML else ratio > 2


class Watching(nn.Module):
    """Notes whether its inputs have data."""

    def __init__(self):
        super().__init__()
        self.conv, self.has_data = nn.Conv2d(2, 4, 8), []
        self.scale = torch.full((4,), 2.0, dtype=torch.float64)  # no buffer: a constant of the trace

    def forward(self, inputs):
        self.has_data.append(not isinstance(inputs, FakeTensor))
        return self.conv(inputs).flatten(1) * self.scale


def test_a_trace_holds_no_data():
    learner, tasks = FOMAML(Watching().double(), LR, 3), draw((2, 8, 8), F.cross_entropy)
    found = meta_gradient(learner, tasks, engine="loop", compile=True)
    assert learner.model.has_data and not any(learner.model.has_data)
    assert_agrees(found, meta_gradient(learner, tasks, engine="loop"), 1e-10)


@pytest.mark.parametrize(
    ("depends", "reason"),
    [
        (lambda inputs: inputs[inputs[:, 0] > 0].mean(0), r"nonzero.*depends on values"),
        (lambda inputs: float(inputs.detach().numpy().std()), r"numpy"),
        (lambda inputs: inputs.sum().item(), r"depends on values|data-dependent"),
    ],
)
def test_what_depends_on_values_runs_uncompiled(depends, reason):
    """It must not be built in as it was for the first tasks."""

    class Depends(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, inputs):
            return self.layer(inputs * depends(inputs))

    learner = FOMAML(Depends().double(), LR, 2)
    with pytest.warns(RuntimeWarning, match=f"compile=True runs uncompiled: .*{reason}"):
        meta_gradient(learner, draw((6,), F.cross_entropy), engine="loop", compile=True)
    tasks = draw((6,), F.cross_entropy)
    found = meta_gradient(learner, tasks, engine="loop", compile=True)
    assert_agrees(found, meta_gradient(learner, tasks, engine="loop"), 1e-10)


def test_a_compiled_function_does_not_keep_its_graph():
    learner = FOMAML(Conv4(4, channels=4, image=(2, 16, 16)).double(), 0.1, 2)
    meta_gradient(learner, draw((2, 16, 16), F.cross_entropy), engine="loop", compile=True)
    kept = weakref.ref(graph(learner))
    GRAPHS.clear()
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("at_once", [2, 5])
def test_a_result_of_a_stack_is_not_written_over_by_the_next(at_once):
    """Of a network whose outputs are what a kernel wrote."""

    class Body(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs).flatten(1)

    model = Body(nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 16, 3)).double()
    tasks = draw((2, 8, 8), F.cross_entropy, tasks=10)
    learner = FOMAML(model, LR, 1)
    first = meta_gradient(learner, tasks, engine="batched", tasks_at_once=at_once, compile=True)
    kept = [tensor.clone() for tensor in (*first.gradients.values(), *first[1:4])]
    for _ in range(3):
        meta_gradient(
            learner,
            tasks.map(lambda tensor: tensor.flip(0)),
            engine="batched",
            tasks_at_once=at_once,
            compile=True,
        )
    found = (*first.gradients.values(), *first[1:4])
    assert all(torch.equal(one, other) for one, other in zip(found, kept, strict=True))


SMALL_CONV4 = partial(Conv4, 4, channels=4, image=(2, 16, 16)), (2, 16, 16)
SMALL_MLP = lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), (6,)


@pytest.mark.parametrize(
    ("model", "engine", "at_once"),
    [
        *((SMALL_CONV4, engine, at_once) for engine in ("loop", "batched") for at_once in (1, 5)),
        (SMALL_MLP, "loop", 1),
        (SMALL_MLP, "batched", 1),
        (SMALL_MLP, "factored", 1),
    ],
)
def test_one_thread_and_two_give_the_same_bits(model, engine, at_once):
    make, shape = model
    tasks = draw(shape, F.cross_entropy, tasks=5).to(dtype=torch.float32)
    learner = FOMAML(make(), 0.1, 2)
    one = meta_gradient(learner, tasks, engine=engine, tasks_at_once=at_once, compile=True)
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            two = meta_gradient(learner, tasks, engine=engine, tasks_at_once=at_once, compile=True)
            assert all(torch.equal(one.gradients[n], two.gradients[n]) for n in one.gradients)
            assert all(torch.equal(a, b) for a, b in zip(one[1:4], two[1:4]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert made(learner) == 1


def test_chunks_of_dense_layers_are_computed_side_by_side(two_threads, monkeypatch):
    """Each on one thread, and both at the same time."""
    make, shape = SMALL_MLP
    tasks = draw(shape, F.cross_entropy, tasks=6)
    learner = FOMAML(make().double(), LR, 1)
    meta_gradient(learner, tasks, engine="batched", tasks_at_once=3, compile=True)
    [(function, _)] = trace._watched[learner].known.values()
    both, threads, run = Barrier(2), [], function._run

    def watched(*arguments):
        both.wait(timeout=60)
        threads.append(torch.get_num_threads())
        return run(*arguments)

    monkeypatch.setattr(function, "_run", watched)
    assert_current(learner, tasks, engine="batched", tasks_at_once=3)
    assert threads == [1, 1]


@pytest.mark.parametrize(("few", "threads"), [(trace.FEW_OPERATIONS, 1), (0, 2)])
def test_a_function_of_few_operations_runs_on_one_thread(few, threads, two_threads, monkeypatch):
    monkeypatch.setattr(trace, "FEW_OPERATIONS", few)
    make, shape = SMALL_MLP
    tasks = draw(shape, F.cross_entropy, tasks=6)
    learner = FOMAML(make().double(), LR, 1)
    meta_gradient(learner, tasks, engine="batched", compile=True)
    [(function, _)] = trace._watched[learner].known.values()
    seen, run = [], function._run
    monkeypatch.setattr(function, "_run", lambda *args: (seen.append(torch.get_num_threads()), run(*args))[1])
    assert_current(learner, tasks, engine="batched")
    assert seen == [threads] and torch.get_num_threads() == 2


def test_operations_of_a_traced_function():
    def function(a, b):
        hidden = (a @ b).relu()  # (2, 3, 4) times (2, 4, 5)
        last = torch.baddbmm(hidden, a, b)
        return torch.addmm(last[0], a[0], b[0])

    traced = make_fx(function)(torch.zeros(2, 3, 4), torch.zeros(2, 4, 5))
    views = sum(
        node.meta["val"].numel()
        for node in traced.graph.nodes
        if node.target in (torch.ops.aten.select.int, torch.ops.aten.expand.default)
        or "view" in str(node.target)
    )
    product = 2 * 3 * 4 * 5
    assert products.operations(traced.graph) == 5 * product + 2 * 3 * 5 + views


@pytest.mark.parametrize("convolutions", [True, False])
def test_random_numbers_are_drawn_in_the_order_of_the_tasks(convolutions):
    tasks = draw((2, 8, 8) if convolutions else (36,), F.cross_entropy, tasks=4)
    learner = FOMAML(dropped(convolutions), LR, 1)
    torch.manual_seed(0)
    expected = meta_gradient(learner, tasks, engine="loop", compile=True)
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            torch.manual_seed(0)
            assert_agrees(meta_gradient(learner, tasks, engine="loop", compile=True), expected, 1e-10)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("tasks", "engine", "hidden", "threads", "size"),
    [
        (32, "batched", 3000, 1, 8),
        (30, "batched", 3000, 1, 6),
        (31, "batched", 3000, 1, 31),
        (12, "batched", 3000, 2, 6),
        (32, "batched", 3000, 9, 32),
        (32, "batched", 20, 1, 32),
        (32, "factored", 3000, 1, 32),
        (32, "factored", 20_000, 2, 16),
        (32, "factored", 20_000, 3, 8),
    ],
)
def test_large_dense_tasks_are_compiled_for_few_at_once(tasks, engine, hidden, threads, size):
    model = nn.Sequential(nn.Linear(36, hidden), nn.ReLU(), nn.Linear(hidden, 4)).double()
    learner = FOMAML(model, LR, 1)
    drawn = draw((36,), F.cross_entropy, tasks=tasks)
    torch.set_num_threads(threads)
    try:
        assert _at_once(learner, drawn, engine, None, compile=True) == size
    finally:
        torch.set_num_threads(1)
    assert _at_once(learner, drawn, engine, None, compile=False) == tasks
    assert _at_once(learner, drawn, engine, 3, compile=True) == 3


# --- products ---------------------------------------------------------------------------------------

DENSE = [
    "mlp",
    "layer-norm",
    "user",
    "twins",
    "drift",
    "gated",
    "attention",
    "no-bias",
    "twice",
    "regression",
    "padded",
]
STACKED = [
    *(
        ("fomaml", module, execution)
        for module in DENSE
        for execution in ("batched", "factored", "factored-2")
    ),
    *(
        ("maml", module, "batched")
        for module in ("user", "twins", "gated", "attention", "regression", "twice")
    ),
    *(("reptile", module, "batched") for module in ("user", "drift", "layer-norm")),
    *((name, "mlp", "batched") for name, row in ALGORITHMS.items() if row.modules("mlp")),
    *((algorithm, "context", "batched") for algorithm in ("cavia", "cavia-second")),
    *((algorithm, "mlp", "factored") for algorithm in ("anil", "boil", "by-name")),
    ("maml", "mlp", "batched-2"),
]


@pytest.mark.parametrize(("algorithm", "module", "execution"), dict.fromkeys(STACKED))
def test_rewritten_products_agree_with_the_reference(algorithm, module, execution, monkeypatch):
    untouched(monkeypatch)
    options = EXECUTIONS[execution] | {"compile": True}
    monkeypatch.setattr(family, "STEPS", 2)
    model, tasks, criterion = example(module)
    learner = ALGORITHMS[algorithm].learner(model, criterion)
    if isinstance(learner.objective, MultiStepLoss):
        with pytest.raises(InputError, match=r"compile=True does not take the multi-step loss"):
            meta_gradient(learner, tasks, **options)
        return
    expected = answer.__wrapped__(algorithm, module)
    check = unchanged(model)
    for _ in range(2):
        assert_agrees(meta_gradient(learner, tasks, **options), expected, 1e-10)
    check()


def test_products_of_all_tasks_become_one(monkeypatch):
    """A shared weight in the first forward pass, and the sum over tasks of the last weight gradient."""
    untouched(monkeypatch)
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, LR, 1, criterion)
    meta_gradient(learner, tasks, engine="batched", compile=True)
    targets = Counter(node.target for node in graph(learner).nodes)
    # the support: two layers forward, one back; the query: two weight gradients
    assert targets[torch.ops.aten.mm.default] == 5


def rewritten(function, *arguments):
    traced = make_fx(function)(*arguments)
    products.rewrite(traced)
    found, expected = traced(*arguments), function(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.stride() == expected.stride() or found.is_contiguous() == expected.is_contiguous()
    return Counter(node.target for node in traced.graph.nodes)[torch.ops.aten.bmm.default] == 0


A, B, W = torch.randn(3, 4, 5), torch.randn(3, 5, 6), torch.randn(5, 6)
C, D = torch.randn(3, 4, 6), torch.randn(1, 4, 5)
bmm = torch.bmm


@pytest.mark.parametrize(
    ("function", "arguments", "one"),
    [
        (lambda a, w: bmm(a, w.expand(3, 5, 6)), (A, W), True),
        (lambda a, w: bmm(a, w.mT.expand(3, 5, 6)), (A, W.mT.contiguous()), True),
        (lambda a, w: bmm(a, w.expand(3, 5, 6)), (A.mT.contiguous().mT, W), False),  # rows that are no view
        (lambda a, w: bmm(a, w[:1].expand(3, 5, 6)), (A, B), True),
        (lambda a, w: bmm(a, w), (A, B), False),
        (lambda a, w: bmm(a, w), (D, B[:1]), False),
        (lambda a, c: bmm(a.mT, c).sum(0), (A, C), True),
        (lambda a, c: bmm(a.mT, c).mT.sum(0), (A, C), True),
        (lambda a, c: bmm(a.mT, c).transpose(1, 2).transpose(1, 2).sum(0), (A, C), True),
        (lambda a, c: bmm(a.mT, c).transpose(1, 2).sum(0, keepdim=True), (A, C), True),
        (lambda a, c: bmm(a.mT, c).sum(1), (A, C), False),
        (lambda a, c: bmm(a.mT, c).sum((0, 1)), (A, C), False),
        (lambda a, c: bmm(a.mT, c).transpose(0, 1).sum(0), (A, C), False),
        (lambda a, c: bmm(a.mT, c).view(5, 3, 6).sum(0), (A, C), False),
        (lambda a, b: bmm(a, b).sum(0), (A, B), False),  # the left is not contiguous when turned
        (lambda a, c: bmm(a.mT, c).sum(0) * bmm(a.mT, c)[0], (A, C), False),
    ],
)
def test_only_products_that_are_one_are_rewritten(function, arguments, one):
    assert rewritten(function, *(a.double() for a in arguments)) == one


def test_a_sum_in_another_dtype_stays():
    function, a, c = (lambda a, c: bmm(a.mT, c).sum(0, dtype=torch.float64)), A.float(), C.float()
    assert not rewritten(function, a, c)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_conjugate_gradients(engine, monkeypatch):
    untouched(monkeypatch)
    model, tasks, criterion = example("regression")
    assert_current(iMAML(model, LR, 1, criterion, strength=5.0, cg_steps=3), tasks, engine=engine)


@pytest.mark.parametrize(
    ("algorithm", "module", "engine"),
    [("fomaml", "regression", "batched"), ("fomaml", "mlp", "factored"), ("maml", "no-bias", "batched")],
)
def test_through_the_inductor(algorithm, module, engine, monkeypatch):
    monkeypatch.setattr(family, "STEPS", 1)
    model, tasks, criterion = example(module)
    learner = ALGORITHMS[algorithm].learner(model, criterion)
    check = unchanged(model)
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        check = unchanged(model)
        result = meta_gradient(learner, tasks, engine=engine, compile=True)
        slow = ALGORITHMS[algorithm].slow
        expected = reference.over_tasks(partial(slow_task, slow, criterion), model, tasks)
        assert_agrees(result, expected, 1e-10)
        check()
    assert result.engine == engine


def slow_task(slow, criterion, model, task):
    return slow(model, task, criterion)


# --- out of memory ----------------------------------------------------------------------------------

MESSAGES = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
}


def limited(monkeypatch, engine, most, error):
    """Chunks of more than `most` tasks raise the error. Returns the list of the sizes that were tried."""
    tried, problem = [], ENGINES[engine]

    def guarded(learner, chunk, **facts):
        tried.append(len(chunk.support.targets))
        if tried[-1] > most:
            raise error
        return problem(learner, chunk, **facts)

    monkeypatch.setitem(ENGINES, engine, guarded)
    return tried


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("engine", ["batched", "factored"])
def test_out_of_memory_halves_the_tasks_at_once(engine, kind, monkeypatch):
    model, _, criterion = example("mlp")
    tasks = draw((36,), F.cross_entropy, tasks=7)
    expected = slow_answer(reference.fomaml, model, tasks)
    tried = limited(monkeypatch, engine, 2, MESSAGES[kind])
    learner = FOMAML(model, LR, 2, criterion)
    with pytest.warns(RuntimeWarning) as warned:
        result = meta_gradient(learner, tasks, engine=engine)
    assert [str(w.message) for w in warned] == [
        f"out of memory: {n} tasks at once from now on" for n in (4, 2)
    ]
    assert {w.filename for w in warned} == {__file__}
    assert_agrees(result, expected, 1e-10)
    assert tried == [7, 4, 2, 2, 2, 1]
    tried.clear()
    assert_agrees(
        meta_gradient(learner, tasks, engine=engine), expected, 1e-10
    )  # remembered: no warning, an error
    assert tried == [2, 2, 2, 1]
    tried.clear()
    meta_gradient(learner, tasks, engine=engine, tasks_at_once=1)
    assert tried == [1] * 7
    tried.clear()
    with pytest.warns(RuntimeWarning):
        meta_gradient(FOMAML(model, LR, 2, criterion), tasks, engine=engine, tasks_at_once=3)
    assert tried == [3, 2, 2, 2, 1]


def test_out_of_memory_when_compiled(monkeypatch):
    untouched(monkeypatch)
    model, _, criterion = example("mlp")
    tasks = draw((36,), F.cross_entropy, tasks=6)
    limited(monkeypatch, "batched", 2, MESSAGES["gpu"])
    learner = FOMAML(model, LR, 2, criterion)
    with pytest.warns(RuntimeWarning) as warned:
        result = meta_gradient(learner, tasks, engine="batched", compile=True)
    assert [str(w.message) for w in warned] == [
        f"out of memory: {n} tasks at once from now on" for n in (3, 2)
    ]
    assert_agrees(result, slow_answer(reference.fomaml, model, tasks), 1e-10)
    assert_current(learner, tasks, engine="batched")


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_a_single_task_out_of_memory_raises(engine, monkeypatch):
    model, tasks, criterion = example("mlp")
    limited(monkeypatch, engine, 0, MESSAGES["gpu"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch.OutOfMemoryError):
            meta_gradient(FOMAML(model, LR, 2, criterion), tasks, engine=engine)


@pytest.mark.parametrize(
    "error", [RuntimeError("no such thing"), IndexError("no such thing"), KeyError("thing")]
)
def test_other_errors_are_not_swallowed(error, monkeypatch):
    model, tasks, criterion = example("mlp")
    tried = limited(monkeypatch, "batched", 2, error)
    for tasks_at_once in (None, 3):
        with pytest.raises(InputError, match=r"engine='batched' does not take this module.*thing") as raised:
            meta_gradient(
                FOMAML(model, LR, 2, criterion), tasks, engine="batched", tasks_at_once=tasks_at_once
            )
        assert raised.value.__cause__ is error
    assert tried == [3, 3]


# --- lower precision --------------------------------------------------------------------------------


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
