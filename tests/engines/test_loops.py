"""Loops of our own: what they compute is what torch's operators do, on any order in memory."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiling import assert_close
from family import LR
from fomaml.engines import _torch, meta_gradient
from fomaml.engines.compiled import cache, loops, programs
from fomaml.engines.compiled.cache import too_old
from fomaml.engines.compiled.programs import Program, program
from fomaml.engines.compiled.values import Unknown
from fomaml.learning.algorithms import FOMAML, MAML
from fomaml.tasks import Examples, Task
from zoo import draw

pytestmark = pytest.mark.skipif(bool(too_old()), reason=too_old())
LABELS = torch.tensor([[0, 2, -100], [1, 1, 4]])


def numbers(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def turned(*shape, **options):
    """With the first axis innermost in memory."""
    return numbers(*shape[1:], shape[0], **options).movedim(-1, 0)


def cross_entropy(scores, labels):
    """Its values and slopes, over tasks, as the engines trace them."""

    def loss(scores, labels):
        return F.cross_entropy(scores, labels)

    return [*torch.func.vmap(torch.func.grad_and_value(loss))(scores, labels)]


def norm_slopes(x, y):
    def loss(x):
        return (F.layer_norm(x, x.shape[-1:]) * y).sum()

    return [torch.func.grad(loss)(x), F.layer_norm(x, x.shape[-1:], y[0], y[1])]


def attention(q, k, v):
    def loss(q):
        return (torch.softmax(q @ k.mT, -1) @ v).square().sum()

    return [torch.func.grad(loss)(q), torch.log_softmax(q, 0)]


def parts(x, y):
    """Slopes by three slices of one tensor."""

    def loss(x):
        one, two = x[:, 0], x[:, 2]
        return (one * two.transpose(0, 1).contiguous().transpose(0, 1)).sum() + one.square().sum()

    return [torch.func.grad(loss)(x), x[:, 1] * y]


A, B = numbers(4, 3, 5), turned(4, 3, 5, seed=1)
HELD = numbers(5, seed=3)
EMPTY_ROW = numbers(3, 4).index_fill(0, torch.tensor(1), -torch.inf)
FUNCTIONS = {
    "a chain": (lambda a, b: [(a * 2 + b) / 3 - a.neg(), a.relu(), torch.exp(b), torch.sigmoid(a), a * 1], [A, B]),
    "whole numbers and powers": (
        lambda a, b: [a**2, a.square(), 1 - a, torch.rsub(a, b, alpha=2), 2 * b, torch.add(a, b, alpha=3), a - 0.5],
        [A, B],
    ),
    "other orders in memory": (lambda a, b: [a.mT * b.mT, (a + b).transpose(0, 2), a.mT.contiguous() + 1], [A, B]),
    "broadcast": (lambda a, b: [a + b[0], a * b[:, :1], b[..., None] - a[:, :, None]], [A, B]),
    "sums": (lambda a, b: [a.sum(), b.sum(0), a.sum((0, 2)), b.sum(1, keepdim=True), (a * b).sum(-1)], [A, B]),
    "means": (lambda a, b: [a.mean(), b.mean(0), (a - b).mean((1, 2)), a.mean(-1, keepdim=True)], [A, B]),
    "sums of views": (lambda a, b: [a.expand(2, 4, 3, 5).sum(0), b.mT.sum((0, 1)), b[1].sum(0)], [A, B]),
    "views": (
        lambda a, b: [a.reshape(12, 5).t(), b.reshape(4, 15) * 2, a[1:3, 2], (a + b).view(2, 2, 15)[1] * 3],
        [A, B],
    ),
    "used twice": (lambda a, b: [(c := a * b + 1) + c.sum(), c.mT @ c, c.relu()], [A, B]),
    "products": (lambda a, b: [a @ b.mT, a.mT @ b, a[0] @ b[1].t(), (a + 1) @ b.mT], [A, B]),
    "products and sums": (
        lambda a, b: [
            torch.addmm(a[0], a[1], b[2].t() @ a[3], beta=0.5, alpha=2),
            torch.baddbmm(a[:, :3, :3], a, b.mT),
        ],
        [A, B],
    ),
    "a product of turned ones": (lambda a, b: [a.permute(2, 0, 1) @ b.permute(2, 1, 0)], [A, B]),
    "joined": (lambda a, b: [torch.stack([a, b], 1), torch.cat([a, b * 2], -1), torch.stack([a]).mT], [A, B]),
    "comparisons": (
        lambda a, b: [torch.where(a > b, a, b * 2), torch.where(a <= 0.5, 1.0, b), (a != b).sum(0)],
        [A, B],
    ),
    "squares": (lambda a, b: [F.mse_loss(a, b, reduction=kind) for kind in ("mean", "none", "sum")], [A, B]),
    "results that are arguments": (lambda a, b: [a, b.mT, a, torch.ones_like(a), a.new_zeros(3)], [A, B]),
    "cross-entropy": (cross_entropy, [numbers(2, 3, 5), LABELS]),
    "layer norm": (norm_slopes, [numbers(4, 5, 7), numbers(5, 7)]),
    "layer norm of turned ones": (norm_slopes, [turned(4, 5, 7), numbers(5, 7)]),
    "attention": (attention, [A, B, numbers(4, 3, 5, seed=2)]),
    "rows of -inf": (lambda a: [torch.ops.aten._safe_softmax(a, -1), torch.softmax(a, 0)], [EMPTY_ROW]),
    "slices": (parts, [numbers(4, 3, 5), numbers(4, 5)]),
    "one number": (lambda a: [a + 1, a.expand(3), a.sum()], [numbers()]),
}  # fmt: skip


def in_loops(function, inputs):
    """What it gives in loops, and by torch's operators."""
    graph = _torch.trace(function, *inputs)
    return program(graph)(*inputs), function(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_compute_what_torch_does(name, dtype):
    function, inputs = FUNCTIONS[name]
    inputs = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs]
    found, expected = in_loops(function, inputs)
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_threads_that_share_loops_out_compute_the_same(name, monkeypatch):
    monkeypatch.setattr(loops, "MUCH", 1)
    function, inputs = FUNCTIONS[name]
    graph = _torch.trace(function, *inputs)
    for one, other in zip(program(graph, 3)(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_exponentials_are_right_over_the_whole_range():
    x = torch.cat(
        [
            torch.linspace(-87.3, 88.7, 200_001),
            torch.tensor([torch.inf, -torch.inf, torch.nan, 100.0, -120.0]),
        ]
    )
    [found], _ = in_loops(lambda x: [x.exp()], [x])
    exact = x.double().exp()
    assert ((found[:-5].double() - exact[:-5]).abs() / exact[:-5]).max() <= 3e-7
    torch.testing.assert_close(
        found[-5:], torch.tensor([torch.inf, 0.0, torch.nan, torch.inf, 0.0]), equal_nan=True
    )


def test_what_is_not_a_number_stays_so():
    x = torch.tensor([[1.0, torch.nan, -2.0]])
    [one, two], expected = in_loops(lambda x: [x.relu(), torch.log_softmax(x, 1)], [x])
    torch.testing.assert_close(one, expected[0], equal_nan=True)
    assert two.isnan().all()


@pytest.mark.parametrize("shape", [(1, 2), (16, 10), (37, 32), (3, 11, 5), (40, 33), (5, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logarithms_of_the_softmax_of_rows_are_right(shape, dtype):
    x = 30 * numbers(*shape).to(dtype)
    x.view(-1, shape[-1])[0, 0] = 1e4
    x.view(-1, shape[-1])[-1, -1] = -torch.inf
    [found], _ = in_loops(lambda x: [torch.log_softmax(x, -1)], [x])
    exact = torch.log_softmax(x.double(), -1)
    tolerance = 4e-7 if dtype == torch.float32 else 1e-15
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_row_is_the_same_beside_others_and_does_not_see_them():
    x = numbers(37, 10)
    x[5, 3], x[20] = torch.nan, torch.inf
    [whole], _ = in_loops(lambda x: [torch.log_softmax(x, 1)], [x])
    assert whole.isnan().any(1).nonzero().flatten().tolist() == [5, 20]
    for rows in (slice(0, 1), slice(6, 19), slice(21, 37)):
        [part], _ = in_loops(lambda x: [torch.log_softmax(x, 1)], [x[rows].clone()])
        assert torch.equal(part, whole[rows])


def test_results_lie_in_memory_as_those_of_torch():
    found, expected = in_loops(lambda a, b: [a @ b.mT, (a @ b.mT).mT, a.sum(0)], [A, B])
    assert [tensor.stride() for tensor in found] == [tensor.stride() for tensor in expected]


def test_calls_share_nothing():
    run = program(_torch.trace(lambda a, b: [(a @ b.mT).relu() @ b, a.sum(0)], A, B))
    first = run(A, B)
    kept = [tensor.clone() for tensor in first]
    run(2 * A, B)
    assert all(map(torch.equal, first, kept))


def test_threads_may_call_at_the_same_time():
    def function(a, b):
        for _ in range(20):
            a = (a @ b.mT).relu() @ b - a.mean(-1, keepdim=True)
        return [a]

    small = [A / 4, B / 4]
    run = program(_torch.trace(function, *small))
    inputs = [[(1 + i / 50) * small[0], small[1]] for i in range(50)]
    expected = [function(*each)[0] for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: run(*each)[0], inputs))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_arguments_in_another_order_in_memory_than_traced_are_read_right():
    run = program(_torch.trace(lambda a, b: [a - b], A, A.clone()))
    torch.testing.assert_close(run(B, A)[0], B - A)


def test_a_label_beyond_the_outputs_is_an_error():
    scores, labels = numbers(2, 3, 5), LABELS.clamp(min=0)
    run = program(_torch.trace(cross_entropy, scores, labels))
    run(scores, labels)
    for wrong in (5, -1, 10**12):
        with pytest.raises(IndexError, match="beyond the outputs"):
            run(scores, torch.full_like(labels, wrong))
    torch.testing.assert_close(run(scores, labels), cross_entropy(scores, labels))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: [torch.linalg.inv(a @ a.mT)],
        lambda a, b: [torch.nn.functional.dropout(a)],
        lambda a, b: [a.clone().add_(b)],
        lambda a, b: [a.bfloat16() * 2],
        lambda a, b: [a.to(torch.int32)],
        lambda a, b: [a * HELD],
        lambda a, b: [torch.func.grad(lambda x: x[:, 1:].square().sum())(a)],
    ],
    ids=["unknown", "random", "in place", "narrow", "whole", "a constant", "a part of a slope"],
)
def test_the_rest_is_left_to_torch(function):
    with pytest.raises(Unknown):
        program(_torch.trace(function, A, B))


def transformer():
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(40, 4)), (5, 8)


def regression():
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 1)), (6,)


def mlp():
    return nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 4)), (60,)


@pytest.mark.parametrize(
    ("build", "engine", "preset", "dtype"),
    [
        pytest.param(*case, dtype, marks=[pytest.mark.long] * (case[0] is transformer and dtype is other))
        for dtype in (torch.float32, torch.float64)
        for *case, other in [
            (mlp, "factored", FOMAML, None),
            (mlp, "batched", FOMAML, None),
            (mlp, "batched", MAML, None),
            (regression, "batched", FOMAML, None),
            # each takes the compiler six seconds
            (transformer, "batched", FOMAML, torch.float64),
            (transformer, "factored", FOMAML, torch.float32),
        ]
    ],
)
def test_meta_gradients_are_those_of_the_engines(build, engine, preset, dtype):
    torch.manual_seed(0)
    model, shape = build()
    criterion = F.mse_loss if build is regression else F.cross_entropy
    tasks = draw(shape, F.cross_entropy, tasks=4).to(dtype=dtype)
    if build is regression:
        tasks = Task(*(Examples(part.inputs, part.inputs[..., :1].sin()) for part in tasks))
    learner = preset(model.to(dtype), LR, 3, criterion)
    found = meta_gradient(learner, tasks, engine=engine, compile=True)
    [own] = cache._watched[learner].known.values()
    assert isinstance(own.function._run, Program) and not own.why
    expected = meta_gradient(learner, tasks, engine=engine)
    assert_close(found, expected, 1e-4 if dtype == torch.float32 else 1e-10)
    torch.testing.assert_close(found.query_losses, expected.query_losses)
    torch.testing.assert_close(found.support_losses, expected.support_losses)


def test_steps_of_the_same_shape_are_compiled_once(monkeypatch, tmp_path):
    def functions(steps):
        texts = []
        real = programs.build.compiled
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path))
            patch.setattr(
                programs.build, "compiled", lambda *arguments: (texts.append(arguments[2]), real(*arguments))
            )
            learner = FOMAML(mlp()[0].double(), LR, steps)
            meta_gradient(learner, draw((60,), F.cross_entropy, tasks=3), engine="batched", compile=True)
        return texts[0].count("noinline")

    assert functions(3) == functions(9) > 0


def test_torchs_compiler_is_not_even_imported(tmp_path):
    code = """
import sys, torch
from fomaml import FOMAML, Examples, Task, meta_gradient
inputs = torch.linspace(-1, 1, 3 * 8 * 36).view(3, 8, 36).sin()
labels = torch.arange(8).expand(3, -1) % 4
tasks = Task(Examples(inputs, labels), Examples(inputs.cos(), labels))
model = torch.nn.Sequential(torch.nn.Linear(36, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
meta_gradient(FOMAML(model, 0.1, 2), tasks, engine="batched", compile=True)
assert "torch._inductor.compile_fx" not in sys.modules
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "FOMAML_KEEP_COMPILED": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    [library] = (tmp_path / "fomaml").iterdir()
    assert library.name.startswith("loops-")


def test_nothing_is_kept_where_that_is_not_wanted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FOMAML_KEEP_COMPILED", "0")
    [found], [expected] = in_loops(lambda a, b: [a * 7 - b], [A, B])
    torch.testing.assert_close(found, expected)
    assert not [*tmp_path.iterdir()]
