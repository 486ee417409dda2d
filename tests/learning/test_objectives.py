"""Conjugate gradients against a direct solution, for one system and for a stack of them."""

import pytest
import torch

from fomaml.errors import InputError
from fomaml.learning.objectives import Implicit, conjugate_gradients

SIZES = [(3,), (2, 2), ()]  # three tensors, eight numbers


def systems(eigenvalues, number=3):
    """Matrices (number, 8, 8) of these eigenvalues, and right-hand sides (number, 8)."""
    generator = torch.Generator().manual_seed(1)
    bases, _ = torch.linalg.qr(torch.randn(number, 8, 8, generator=generator, dtype=torch.float64))
    matrices = bases @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ bases.mT
    return matrices, torch.randn(number, 8, generator=generator, dtype=torch.float64)


def split(flat):
    """(..., 8) → the three tensors."""
    sizes = [torch.Size(s).numel() for s in SIZES]
    return [part.reshape(flat.shape[:-1] + s) for part, s in zip(flat.split(sizes, -1), SIZES)]


def join(parts, lead):
    return torch.cat([part.flatten(lead) if part.dim() > lead else part[..., None] for part in parts], -1)


def solve(matrices, right, steps):
    lead = right.dim() - 1

    def product(vector):
        return split((matrices @ join(vector, lead)[..., None])[..., 0])

    return join(conjugate_gradients(product, split(right), steps, lead), lead)


POSITIVE, INDEFINITE = [1, 1.5, 2, 3, 5, 8, 13, 21], [-3, -0.5, 1, 1.5, 2, 3, 5, 8]


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("eigenvalues", [POSITIVE, INDEFINITE], ids=["positive", "indefinite"])
def test_equals_a_direct_solution(eigenvalues, stacked):
    """Of an indefinite system too: short of the inner minimum I + H/λ may be one."""
    matrices, right = systems(eigenvalues)
    expected = torch.linalg.solve(matrices, right)
    found = (
        solve(matrices, right, 10) if stacked else torch.stack(list(map(solve, matrices, right, [10] * 3)))
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_task_that_is_solved_leaves_the_others_alone():
    matrices, right = systems(POSITIVE)
    right[1] = 0.0
    found = solve(matrices, right, 40)
    assert not found[1].any()
    torch.testing.assert_close(found, torch.linalg.solve(matrices, right), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_a_damping_below_zero_is_an_input_error(damping):
    with pytest.raises(InputError, match="must be a positive finite number"):
        Implicit(2.0, damping=damping)
