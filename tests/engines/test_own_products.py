"""Products of matrices of our own, for processors on which torch's leave half of the registers empty."""

import ctypes
import itertools

import pytest
import torch
import torch.nn.functional as F

from family import assert_agrees
from fomaml.engines import meta_gradient
from fomaml.engines.compiled import programs
from fomaml.engines.cpu import build
from fomaml.learning.algorithms import FOMAML, MAML
from fomaml.models import MLP
from zoo import draw

pytestmark = pytest.mark.filterwarnings("error")


def product(left, right, added=None, beta=0.0, alpha=1.0, stack=()):
    """beta · added + alpha · left @ right, by products.cpp."""
    out = torch.full((*stack, left.shape[-2], right.shape[-1]), torch.nan, dtype=left.dtype)
    strides = []
    for each in (out, left, right, added):
        own = (0, 0, 0) if each is None else each.stride()
        strides += [*[0] * (3 - len(own)), *own]
    sizes = (stack[0] if stack else 1, *left.shape[-2:], right.shape[-1], *strides)
    dtype = str(out.dtype).removeprefix("torch.")
    address = None if added is None else added.data_ptr()
    kernel = getattr(build.products(dtype), f"product_{dtype}")
    pointers = [each.data_ptr() for each in (out, left, right)]
    kernel(*pointers, address, (ctypes.c_longlong * 16)(*sizes), beta, alpha)
    return out


def matrix(*shape, turned, dtype):
    drawn = torch.randn(*shape[:-2], *(shape[:-3:-1] if turned else shape[-2:]), dtype=dtype)
    return drawn.transpose(-1, -2) if turned else drawn


SIZES = [(1, 1, 1), (5, 784, 256), (6, 16, 64), (7, 13, 21), (75, 5, 10), (64, 300, 65), (13, 1100, 800)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_product_is_that_of_torch(sizes, dtype):
    rows, inner, columns = sizes
    torch.manual_seed(1)
    for turned in itertools.product([False, True], repeat=2):
        left = matrix(rows, inner, turned=turned[0], dtype=dtype)
        right = matrix(inner, columns, turned=turned[1], dtype=dtype)
        added = matrix(rows, columns, turned=turned[0], dtype=dtype)
        exact = left.double() @ right.double()
        tolerance = 4e-6 if dtype == torch.float32 else 1e-14
        for found, expected in (
            (product(left, right), exact),
            (product(left, right, added, 0.5, -2.0), 0.5 * added.double() - 2 * exact),
            (product(left, right, added[:1].expand(rows, columns), 1.0, 1.0), added[:1].double() + exact),
        ):
            assert ((found - expected).norm() / expected.norm()).item() < tolerance


def test_what_is_added_zero_times_is_not_looked_at():
    left, right = torch.ones(2, 3), torch.ones(3, 4)
    assert (product(left, right, torch.full((2, 4), torch.nan), 0.0, 1.0) == 3).all()


@pytest.mark.parametrize("turned", [False, True])
def test_a_stack_of_products(turned):
    left, right = (matrix(3, *size, turned=turned, dtype=torch.float64) for size in ((4, 9), (9, 70)))
    torch.testing.assert_close(product(left, right, stack=(3,)), left @ right, rtol=1e-13, atol=1e-13)
    one = left[1].expand(3, 4, 9)
    torch.testing.assert_close(product(one, right, stack=(3,)), one @ right, rtol=1e-13, atol=1e-13)


@pytest.fixture
def ours(monkeypatch):
    """As on a processor where they are faster; all but the smallest. Notes the C++ that is compiled."""
    monkeypatch.setattr(build, "leaves_registers_empty", lambda: True)
    monkeypatch.setattr(programs, "FEW", 2)
    monkeypatch.setattr(programs, "SHARED", 2)
    monkeypatch.setattr(programs, "small", lambda step, threads: None)
    texts = []
    text = programs._text
    monkeypatch.setattr(programs, "_text", lambda *facts: texts.append(text(*facts)) or texts[-1])
    return texts


@pytest.mark.parametrize(
    ("engine", "algorithm"), [("batched", FOMAML), ("batched", MAML), ("factored", FOMAML)]
)
def test_a_meta_gradient_is_that_of_the_uncompiled_engine(engine, algorithm, ours):
    tasks = draw((6,), F.cross_entropy, tasks=5)
    learner = algorithm(MLP(6, 8, 4).double(), 0.1, 2)
    expected = meta_gradient(learner, tasks, engine="loop")
    one = meta_gradient(learner, tasks, engine=engine, compile=True)
    assert_agrees(one, expected, 1e-10)
    assert any("product<double>(1, " in text for text in ours)
    torch.set_num_threads(2)
    try:
        two = meta_gradient(learner, tasks, engine=engine, tasks_at_once=5, compile=True)
    finally:
        torch.set_num_threads(1)
    assert_agrees(two, expected, 1e-10)


def test_threads_share_a_product_out_to_the_same_bits(ours):
    from fomaml.engines import _torch

    def function(left, right, stack, other):
        return [left @ right, torch.baddbmm(stack @ other, stack, other, beta=0.5, alpha=2.0)]

    inputs = [torch.randn(*shape) for shape in ((37, 20), (20, 70), (3, 5, 7), (3, 7, 18))]
    found = []
    for threads in (1, 2):
        run = programs.program(_torch.trace(function, *inputs), threads)
        found.append(run(*inputs))
    assert ["product<float>(1, " in ours[0], "product<float>(2, " in ours[1]] == [True, True]
    assert all(map(torch.equal, *found))
    for own, expected in zip(found[0], function(*inputs)):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("AuthenticAMD", "fpu avx2 avx512f", True),
        ("AuthenticAMD", "fpu avx2", False),
        ("GenuineIntel", "fpu avx512f", False),
        ("", "", False),
    ],
)
def test_which_processors_they_are_for(vendor, flags, expected, monkeypatch):
    monkeypatch.setattr(build, "processor_facts", lambda: {"vendor_id": vendor, "flags": flags})
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    build.leaves_registers_empty.cache_clear()
    try:
        assert build.leaves_registers_empty() is expected
    finally:
        build.leaves_registers_empty.cache_clear()
