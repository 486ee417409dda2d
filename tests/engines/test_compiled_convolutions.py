"""compile=True on convolutions: rewritten meta-gradients against the slow loops of reference.py."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import family
import reference
from compiling import assert_close, fused, graph, slow_answer, targets, two_blocks, unchanged, untouched
from convolutions import CONVOLUTIONS, convolutional
from family import ALGORITHMS, LR, answer, assert_agrees
from fomaml.engines import meta_gradient
from fomaml.engines.cpu import fusion, kernels, lifted
from fomaml.engines.cpu.kernels import norm_relu_pool
from fomaml.errors import InputError
from fomaml.learning.algorithms import FOMAML, MAML, Reptile
from fomaml.learning.objectives import MultiStepLoss
from zoo import MODULES, draw, example

SOME = {
    "fomaml": (FOMAML, reference.fomaml),
    "maml": (MAML, reference.maml),
    "reptile": (Reptile, reference.reptile),
}


# stacked they take twice as long to trace, and differ from the others in what both engines share
SHORT = {"fomaml", "maml", "zero-head", "lslr", "by-name"}
# inner optimisers, whose arithmetic is the same whatever the network: test_products.py has them
LONG = {
    "maml-nesterov", "maml-momentum", "maml-minibatch", "maml-decay", "reptile-adam", "fomaml-adamw", "fomaml-nesterov",
}  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "engine"),
    [
        pytest.param(
            name,
            engine,
            marks=[pytest.mark.long] * (name in LONG or (engine == "batched" and name not in SHORT)),
        )
        for name, row in ALGORITHMS.items()
        for engine in ("loop", "batched")
        if row.modules("conv4-strided")
    ],
)
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


FEW = {"conv4", "conv4-running", "batch-norm", "residual", "frozen"}
CASES = [
    (module, algorithm)
    for module in CONVOLUTIONS
    for algorithm in SOME
    if algorithm == "fomaml" or (module in FEW if algorithm == "reptile" else "conv4" not in module)
]


@pytest.mark.parametrize(
    ("module", "algorithm", "engine"),
    [
        # each takes a second or two to trace: in second order and stacked most of them are for `make test-long`
        pytest.param(*case, "loop", marks=[pytest.mark.long] * (case[1] == "maml" and case[0] not in FEW))
        for case in CASES
    ]
    + [
        pytest.param(*case, "batched", marks=[pytest.mark.long] * (case[0] not in FEW))
        for case in CASES
        if case[1] == "fomaml" or case[0] in ("wide", "batch-norm")
    ],
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
