"""Products of small matrices, by C++ that has their sizes built in."""

import itertools

import pytest
import torch

from fomaml.engines import _torch
from fomaml.engines.compiled import programs, small
from fomaml.engines.compiled.cache import too_old
from fomaml.engines.cpu import build

pytestmark = pytest.mark.skipif(bool(too_old()), reason=too_old())


@pytest.fixture
def texts(monkeypatch):
    """The C++ that is compiled."""
    found = []
    text = programs._text
    monkeypatch.setattr(programs, "_text", lambda *facts: found.append(text(*facts)) or found[-1])
    return found


def matrix(*shape, turned, dtype):
    drawn = torch.randn(*shape[:-2], *(shape[:-3:-1] if turned else shape[-2:]), dtype=dtype)
    return drawn.mT if turned else drawn


def program(function, *inputs, threads=1):
    return programs.program(_torch.trace(function, *inputs), threads)


# of rows, sums and columns: a single one of each, less than a vector, whole vectors, some more, many rows
SIZES = [
    (1, 1, 1),
    (1, 9, 40),
    (9, 1, 40),
    (37, 40, 1),
    (10, 16, 16),
    (7, 13, 5),
    (25, 33, 70),
    (130, 20, 100),
    (40, 75, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_product_is_that_of_torch(sizes, dtype, texts):
    rows, inner, columns = sizes
    torch.manual_seed(1)
    inputs = []
    for turned in itertools.product([False, True], repeat=2):
        inputs += [
            matrix(rows, inner, turned=turned[0], dtype=dtype),
            matrix(inner, columns, turned=turned[1], dtype=dtype),
        ]
    added = torch.randn(rows, columns, dtype=dtype), torch.randn(columns, dtype=dtype)

    def function(whole, row, *pairs):
        found = []
        for left, right in zip(pairs[::2], pairs[1::2]):
            found += [
                left @ right,
                torch.addmm(whole, left, right, beta=0.5, alpha=-2),
                torch.addmm(row, left, right),
            ]
        return found

    given = *added, *inputs
    found = program(function, *given)(*given)
    assert texts[0].count("Small<") >= 3 and "mm(h[" not in texts[0]
    expected = function(*(each.double() for each in given))
    for own, exact in zip(found, expected):
        tolerance = 4e-6 if dtype == torch.float32 else 1e-14
        assert ((own - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize("turned", [*itertools.product([False, True], repeat=2)], ids=str)
def test_a_stack_of_products(turned, texts):
    left = matrix(6, 9, 21, turned=turned[0], dtype=torch.float64)
    right = matrix(6, 21, 18, turned=turned[1], dtype=torch.float64)
    added = torch.randn(6, 9, 18, dtype=torch.float64)

    def function(left, right, added):
        one = right[:1].expand(6, 21, 18)
        return [
            left @ right,
            torch.baddbmm(added, left, right, beta=2, alpha=0.5),
            torch.bmm(left, one),
            left @ right[..., :1],
        ]

    given = left, right, added
    alone = program(function, *given)(*given)
    assert "Small<" in texts[0]
    for own, exact in zip(alone, function(*given)):
        torch.testing.assert_close(own, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("inner, columns", [(256, 10), (784, 5), (100, 3), (77, 1), (300, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_columns_are_summed_along_vectors(inner, columns, dtype):
    torch.manual_seed(2)
    left, right = torch.randn(23, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype).mT
    added = torch.randn(23, columns, dtype=dtype)

    def function(added, left, right):
        return [left @ right, torch.addmm(added, left, right, beta=2, alpha=-0.5)]

    given = added, left, right
    whole = program(function, *given)(*given)
    tolerance = 4e-6 if dtype == torch.float32 else 1e-14
    for own, exact in zip(whole, function(*(each.double() for each in given))):
        assert ((own - exact).norm() / exact.norm()).item() < tolerance
    for rows in (1, 2, 7, 22):
        part = added[:rows].clone(), left[:rows].clone(), right
        for own, every in zip(program(function, *part)(*part), whole):
            assert torch.equal(own, every[:rows])


def test_a_number_is_the_same_sum_whatever_else_is_computed():
    left, right = torch.randn(50, 30), torch.randn(30, 70)

    def function(left, right):
        return [left @ right]

    [whole] = program(function, left, right)(left, right)
    for rows, columns in ((1, 70), (7, 40), (50, 3), (23, 17)):
        part = left[:rows].contiguous(), right[:, :columns].contiguous()
        [found] = program(function, *part)(*part)
        assert torch.equal(found, whole[:rows, :columns])


def test_what_is_added_zero_times_is_not_looked_at():
    left, right, added = torch.ones(2, 3), torch.ones(3, 4), torch.full((2, 4), torch.nan)

    def function(added, left, right):
        return [torch.addmm(added, left, right, beta=0)]

    assert (program(function, added, left, right)(added, left, right)[0] == 3).all()


def test_numbers_that_are_not_finite_stay_so():
    left, right = torch.ones(3, 5), torch.ones(5, 4)
    left[1, 2], right[3, 0] = torch.inf, torch.nan

    def function(left, right):
        return [left @ right]

    [found] = program(function, left, right)(left, right)
    torch.testing.assert_close(found, left @ right, equal_nan=True)


def test_threads_share_a_stack_out_to_the_same_bits(texts, monkeypatch):
    monkeypatch.setattr(small, "SHARED", 2)
    left, right = torch.randn(7, 5, 20), torch.randn(7, 20, 24)

    def function(left, right):
        return [torch.bmm(left, right)]

    found = [program(function, left, right, threads=threads)(left, right) for threads in (1, 2)]
    heads = [text.rpartition("::product(")[0][-300:] for text in texts]  # of the only loop
    assert ["omp parallel" in head for head in heads] == [False, True]
    assert torch.equal(*(each for [each] in found))


@pytest.mark.parametrize(
    ("sizes", "ours", "taken"),
    [
        ((10, 40, 40), False, True),
        ((250, 40, 40), False, False),
        ((250, 40, 40), True, True),
        ((25, 784, 256), True, False),  # too much to copy
    ],
)
def test_which_products_are_small(sizes, ours, taken, texts, monkeypatch):
    monkeypatch.setattr(build, "leaves_registers_empty", lambda: ours)
    left, right = torch.randn(*sizes[:2]), torch.randn(*sizes[1:])
    program(lambda left, right: [left @ right], left, right)
    assert ("Small<float," in texts[0].replace("struct Small", "")) is taken
