"""Batch norm, ReLU and max-pool as three operators, and how far the fused kernels may be from them."""

import pytest
import torch
import torch.nn.functional as F

from fomaml.engines.cpu.kernels import norm_relu_pool, norm_relu_pool_backward

EPS = 1e-5


def operators(inputs, gamma, beta, pool, eps=EPS):
    outputs = F.relu(F.batch_norm(inputs, None, None, gamma, beta, training=True, eps=eps))
    return F.max_pool2d(outputs, 2) if pool else outputs


def both(inputs, gamma, beta, pool, slope=None):
    """(outputs, derivatives by inputs, γ and β) of the kernels, and of the operators in float64."""
    outputs, *kept = norm_relu_pool(inputs, gamma, beta, EPS, pool)
    slope = torch.randn_like(outputs) if slope is None else slope
    found = [outputs, *norm_relu_pool_backward(slope, outputs, *kept, gamma, pool)]
    channels = inputs.shape[1]
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    leaves = [inputs, ones if gamma is None else gamma, zeros if beta is None else beta]
    # contiguous: torch 2.14's own derivative of channels-last images takes a strided γ for a contiguous one
    leaves = [leaf.detach().double().contiguous().requires_grad_() for leaf in leaves]
    expected = operators(*leaves, pool)
    return found, [expected.detach(), *torch.autograd.grad(expected, leaves, slope.double())]


def assert_equal(found, expected, tolerance):
    """Within the tolerance of the largest entry."""
    for name, ours, theirs in zip(("outputs", "by inputs", "by gamma", "by beta"), found, expected):
        assert ours.shape == theirs.shape
        scale = max(1.0, theirs.abs().max().item())
        assert (ours.double() - theirs).abs().max().item() <= tolerance * scale, name


def affine(channels, dtype=torch.float64):
    gamma, beta = torch.randn(2, channels, dtype=dtype)
    return gamma, beta


POOL = pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])
