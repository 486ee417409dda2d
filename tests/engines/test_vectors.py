"""What is done to all parameters of a stack of tasks at once."""

import pytest
import torch

from fomaml.engines.cpu import kernels


def stacks(dtype=torch.float64):
    """(tasks, ...) in several orders of memory."""
    weights = torch.randn(3, 4, 2, 5, 6, dtype=dtype)
    return [weights, weights.movedim(2, -1).contiguous().movedim(-1, 2), *torch.randn(2, 3, 7, dtype=dtype)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sums_over_tasks(dtype):
    tensors = stacks(dtype)
    for own in (tensors, [*tensors, torch.randn(7, 3, dtype=dtype).t()], [torch.randn(3, dtype=dtype)]):
        for found, tensor in zip(kernels.sums(own), own, strict=True):
            torch.testing.assert_close(found, tensor.sum(0))
    if dtype in kernels.NAMES:
        assert kernels.sums(tensors)[1].stride() == tensors[1].stride()[1:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_subtracts_from_tensors_of_each_task_or_of_all(dtype):
    rights = stacks(dtype)
    own = [torch.randn_like(right) for right in rights]
    every = [torch.randn_like(right[0]) for right in rights]
    contiguous = [each.contiguous() for each in every]  # in another order than the right one
    for lefts in (own, every, [own[0], every[1], every[2], own[3]], contiguous):
        for found, left, right in zip(kernels.subtract(lefts, rights, 0.3), lefts, rights, strict=True):
            torch.testing.assert_close(found, torch.sub(left, right, alpha=0.3))
