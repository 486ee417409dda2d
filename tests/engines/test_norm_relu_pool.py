"""The fused blocks against autograd through the three operators they stand for."""

from functools import partial

import pytest
import torch

from blocks import EPS, POOL, affine, assert_equal, both, operators
from fomaml.engines.cpu.kernels import channels_last, norm_relu_pool, norm_relu_pool_backward


@POOL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 16, 37])
@pytest.mark.parametrize(
    ("images", "height", "width"),
    [(4, 6, 6), (3, 7, 5), (3, 6, 5), (2, 5, 8), (1, 4, 4), (1, 3, 2), (5, 2, 2)],
)
def test_agrees_with_the_operators(images, height, width, channels, dtype, pool):
    inputs = torch.randn(images, channels, height, width, dtype=dtype)
    found, expected = both(inputs, *affine(channels, dtype), pool)
    assert all(f.dtype == dtype for f in found)
    # a variance of a few numbers may be tiny, and then what divides by it is large
    assert_equal(found, expected, 1e-12 if dtype == torch.float64 else 2e-5)


@POOL
def test_the_blocks_of_the_sums_may_be_full_or_not(pool):
    """The kernels add up in blocks of 64 pixels."""
    for images, size in [(1, 8), (1, 16), (5, 16), (3, 9)]:
        inputs = torch.randn(images, 5, size, size, dtype=torch.float64)
        assert_equal(*both(inputs, *affine(5), pool), 1e-12)


@POOL
@pytest.mark.parametrize("given", ["neither", "gamma", "beta"])
def test_without_gamma_or_beta(given, pool):
    gamma, beta = affine(6)
    inputs = torch.randn(4, 6, 5, 6, dtype=torch.float64)
    gamma, beta = gamma if given == "gamma" else None, beta if given == "beta" else None
    assert_equal(*both(inputs, gamma, beta, pool), 1e-12)


@POOL
def test_negative_and_zero_gamma(pool):
    gamma = torch.tensor([-1.0, 0.0, 0.0, 0.0, -0.3, 2.0], dtype=torch.float64)
    beta = torch.tensor(
        [0.3, 0.5, 0.0, -0.5, -0.1, 0.0], dtype=torch.float64
    )  # with γ = 0 the output is ReLU(β)
    inputs = torch.randn(4, 6, 6, 7, dtype=torch.float64)
    assert_equal(*both(inputs, gamma, beta, pool), 1e-12)


@POOL
def test_ties_within_a_window(pool):
    torch.manual_seed(1)
    inputs = torch.randint(-1, 2, (5, 7, 6, 6)).double()  # three values: nearly every window has a tie
    assert_equal(*both(inputs, *affine(7), pool), 1e-12)
    gamma, beta = torch.ones(2, 7, dtype=torch.float64)
    assert_equal(*both(torch.full_like(inputs, 3.0), gamma, beta, pool), 1e-10)  # 1 / deviation is 316
    assert_equal(*both(torch.full_like(inputs, 0.1), gamma, -beta, pool), 1e-10)
    found, _ = both(torch.zeros_like(inputs), gamma, 0 * beta, pool)
    assert all(not f.any() for f in found)


@POOL
@pytest.mark.parametrize("mean", [1e3, -1e3, 1e5])
def test_a_large_mean_does_not_cancel_the_variance(mean, pool):
    inputs = torch.randn(5, 6, 12, 12) + mean
    gamma, beta = affine(6, torch.float32)
    found, expected = both(inputs, gamma, beta, pool)
    _, _, _, seen, deviation = norm_relu_pool(inputs, gamma, beta, EPS, pool)
    exact = inputs.double()
    variance, middle = torch.var_mean(exact, (0, 2, 3), correction=0)
    torch.testing.assert_close(deviation.double(), (variance + EPS).rsqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.double(), middle, rtol=1e-7, atol=0)
    # the rounding of the inputs themselves, |mean| 6e-8, moves what is near a kink
    assert (found[0].double() - expected[0]).abs().max() <= 4e-7 * abs(mean)
    if abs(mean) == 1e3:
        for ours, theirs in zip(found[2:], expected[2:]):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=0.2)


@POOL
@pytest.mark.parametrize(
    "order", ["contiguous", "channels-last", "sliced", "transposed", "expanded", "shifted"]
)
def test_any_order_of_the_inputs(order, pool):
    make = partial(torch.randn, dtype=torch.float64)
    inputs = {
        "contiguous": lambda: make(4, 5, 6, 7),
        "channels-last": lambda: channels_last(make(4, 5, 6, 7)),
        "sliced": lambda: make(8, 10, 13, 7)[::2, 2:7, 1::2],
        "transposed": lambda: make(5, 4, 7, 6).permute(1, 0, 3, 2),
        "expanded": lambda: make(1, 5, 6, 7).expand(4, 5, 6, 7),
        "shifted": lambda: make(1 + 4 * 5 * 6 * 7)[1:].view(4, 5, 6, 7),
    }[order]()
    before = inputs.clone()
    gamma, beta = make(10)[::2], make(2, 5)[1]
    shape = operators(inputs, gamma, beta, pool).shape
    slopes = [
        make(shape),
        channels_last(make(shape)),
        make(1).expand(shape),
        make(*shape[:2], *(1, 1)).expand(shape),
    ]
    for slope in slopes:
        found, expected = both(inputs, gamma, beta, pool, slope)
        assert_equal(found, expected, 1e-12)
        assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(inputs, before)


@POOL
@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 5), (2, 3)])
def test_derivatives_in_the_place_of_the_inputs_are_the_same(height, width, pool):
    inputs = channels_last(torch.randn(3, 5, height, width, dtype=torch.float64))
    gamma, beta = affine(5)
    outputs, *kept = norm_relu_pool(inputs, gamma, beta, EPS, pool)
    slope = torch.randn_like(outputs)
    expected = norm_relu_pool_backward(slope, outputs, *kept, gamma, pool)
    found = norm_relu_pool_backward(slope, outputs, *kept, gamma, pool, True)
    assert found[0].data_ptr() == inputs.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (3, 4, 1, 1), (1, 4, 4, 4), (1, 1, 4, 4)])
def test_shapes_whose_order_is_ambiguous(shape):
    """With one channel or one pixel `is_contiguous` holds for both orders, whatever the strides."""
    for inputs in (torch.randn(shape), torch.randn(*shape[:2], 9, 9)[..., : shape[2], : shape[3]]):
        assert_equal(*both(inputs.double(), *affine(shape[1]), False), 1e-12)


@POOL
def test_not_a_number_goes_through(pool):
    inputs = torch.randn(3, 4, 6, 6)
    inputs[1, 2, 3, 3] = float("nan")
    gamma, beta = affine(4, torch.float32)
    outputs, *kept = norm_relu_pool(inputs, gamma, beta, EPS, pool)
    assert outputs[:, 2].isnan().all() and not outputs[:, [0, 1, 3]].isnan().any()
    by_inputs, by_gamma, _ = norm_relu_pool_backward(torch.ones_like(outputs), outputs, *kept, gamma, pool)
    assert by_inputs[:, 2].isnan().all() and not by_inputs[:, [0, 1, 3]].isnan().any()
    assert by_gamma.isnan().tolist() == [False, False, True, False]


@POOL
def test_an_infinite_number_is_not_hidden(pool):
    inputs = torch.randn(3, 2, 4, 4)
    inputs[0, 1, 0, 0] = float("inf")
    outputs = norm_relu_pool(inputs, None, None, EPS, pool)[0]
    assert outputs[:, 1].isnan().any() and outputs[:, 0].isfinite().all()


@POOL
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_blocks_of_a_stack_of_tasks(pool, shared):
    inputs = torch.randn(3, 4, 5, 6, 7, dtype=torch.float64)
    vectors = [affine(5) for _ in range(3)]
    gamma, beta = vectors[0] if shared else map(torch.stack, zip(*vectors))
    outputs, *kept = norm_relu_pool(inputs, gamma, beta, EPS, pool)
    slope = torch.randn_like(outputs)
    found = [outputs, *norm_relu_pool_backward(slope, outputs, *kept, gamma, pool)]
    for task, own in enumerate(vectors):
        _, expected = both(inputs[task], *(vectors[0] if shared else own), pool, slope[task])
        assert_equal([each[task] for each in found], expected, 1e-12)
