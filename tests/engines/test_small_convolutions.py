"""The convolutions of few small images against torch's own."""

import platform

import pytest
import torch
import torch.nn.functional as F

from fomaml.engines.cpu import build, kernels


def alone(inputs, weights, bias, slope, stride, padding):
    """(outputs, derivatives by inputs, weights and bias) of torch's own convolutions, task by task."""
    found = []
    for task in range(len(inputs)):
        weight = weights[task] if weights.dim() == 5 else weights
        leaves = [inputs[task], weight, bias[task] if bias.dim() == 2 else bias]
        leaves = [leaf.detach().double().contiguous().requires_grad_() for leaf in leaves]
        outputs = F.conv2d(*leaves, stride, padding)
        found.append([outputs.detach(), *torch.autograd.grad(outputs, leaves, slope[task].double())])
    return [torch.stack(each) for each in zip(*found)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(
    ("channels", "outputs"), [(16, 5), (32, 64), (48, 16), (80, 7), (1, 16), (2, 48), (7, 32)]
)
@pytest.mark.parametrize(
    ("images", "window", "stride", "padding"),
    [
        ((3, 7, 8), (3, 3), (1, 1), (1, 1)),
        ((5, 7, 7), (3, 3), (2, 2), (1, 1)),
        ((2, 6, 9), (3, 3), (2, 1), (0, 2)),
        ((4, 5, 4), (1, 1), (1, 1), (0, 0)),
        ((2, 5, 6), (1, 2), (2, 3), (0, 0)),
        ((1, 3, 3), (3, 2), (1, 1), (0, 0)),
        ((9, 12, 12), (2, 4), (1, 3), (2, 0)),
    ],
)
def test_convolutions_agree_with_torch(images, window, stride, padding, channels, outputs, shared, dtype):
    number, height, width = images
    narrow = channels % 16 != 0
    if narrow and channels * window[0] * window[1] > 64:
        pytest.skip("too many numbers in a patch of few channels")
    inputs = torch.randn(2, number, channels, height, width, dtype=dtype)
    weights = torch.randn(*[2] * (not shared), outputs, channels, *window, dtype=dtype)
    bias = torch.randn(*weights.shape[:-3], dtype=dtype)
    assert kernels.takes(inputs, weights, stride, padding)
    assert kernels.takes(inputs, weights, stride, padding, by_inputs=True) == (not narrow)
    found = kernels.convolution(inputs, weights, bias, stride, padding)
    slope = torch.randn_like(found)
    wanted = (not narrow, True, True)
    derivatives = kernels.convolution_backward(slope, inputs, weights, stride, padding, wanted)
    expected = alone(inputs, weights, bias, slope, stride, padding)
    assert (derivatives[0] is None) == narrow
    for ours, theirs in zip((found, *derivatives), expected, strict=True):
        if ours is not None:
            assert ours.shape == theirs.shape
            assert ours.dtype == dtype
            scale = theirs.abs().max().item()
            assert (ours.double() - theirs).abs().max().item() <= (
                1e-14 if dtype == torch.float64 else 1e-5
            ) * scale
    without = kernels.convolution(inputs, weights, None, stride, padding)
    shift = bias[..., None, None] if shared else bias[:, None, :, None, None]
    torch.testing.assert_close(without + shift, found, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 processors")
@pytest.mark.parametrize("processor", [pytest.param("x86-64-v2", marks=pytest.mark.long), "x86-64-v3"])
def test_narrower_vectors_agree_too(fresh, monkeypatch, processor):
    if processor == "x86-64-v3" and not {"avx2", "fma"} <= set(build._processor().split()):
        pytest.skip("this processor has no AVX2")
    flags = [flag for flag in build.FLAGS if flag != build.NATIVE]
    monkeypatch.setattr(build, "FLAGS", (*flags, f"-march={processor}"))
    for dtype in (torch.float32, torch.float64):
        for shared in (False, True):
            for channels, outputs in ((32, 64), (48, 16), (16, 5), (2, 48), (7, 32)):
                for images, window, stride, padding in (
                    ((5, 7, 7), (3, 3), (2, 2), (1, 1)),
                    ((6, 12, 12), (1, 3), (1, 1), (0, 1)),
                ):
                    test_convolutions_agree_with_torch(
                        images, window, stride, padding, channels, outputs, shared, dtype
                    )


def test_derivatives_that_are_not_wanted_are_left_out():
    inputs, weights = torch.randn(2, 3, 16, 5, 5), torch.randn(2, 4, 16, 3, 3)
    slope = torch.randn(2, 3, 4, 5, 5)
    every = kernels.convolution_backward(slope, inputs, weights, (1, 1), (1, 1), (True, True, True))
    for wanted in [(True, False, False), (False, True, False), (False, False, True)]:
        found = kernels.convolution_backward(slope, inputs, weights, (1, 1), (1, 1), wanted)
        assert [each is not None for each in found] == [*wanted]
        for one, other, want in zip(found, every, wanted):
            assert not want or torch.equal(one, other)


@pytest.mark.parametrize(
    ("inputs", "weights", "dtype", "taken"),
    [
        ((2, 3, 16, 5, 5), (4, 16, 3, 3), torch.float32, True),
        ((2, 3, 16, 5, 5), (4, 16, 3, 3), torch.bfloat16, False),
        ((2, 3, 20, 5, 5), (16, 20, 3, 3), torch.float32, False),  # vectors do not divide the channels
        ((2, 3, 3, 5, 5), (20, 3, 3, 3), torch.float32, False),  # nor the outputs
        ((2, 2400, 16, 5, 5), (4, 16, 3, 3), torch.float32, True),
        ((2, 2401, 16, 5, 5), (4, 16, 3, 3), torch.float32, False),  # many pixels: torch is as fast
    ],
)
def test_which_convolutions_are_taken(inputs, weights, dtype, taken):
    inputs, weights = torch.empty(inputs, dtype=dtype), torch.empty(weights, dtype=dtype)
    assert kernels.takes(inputs, weights, (1, 1), (1, 1)) == taken
