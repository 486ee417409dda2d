"""What a task contributes to the meta-loss: one scalar whose gradient by θ is the meta-gradient.

An objective, see contracts.py, is a callable of a `Problem`, which is one task or a stack of tasks. It returns an
`Outcome`; the engines differentiate and average.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fomaml.errors import InputError, positive
from fomaml.learning.contracts import Adapted, InnerProblem, Outcome
from fomaml.trees import Tree, mapped


@dataclass(frozen=True)
class QueryLoss:
    """L(φ_K; query): MAML, FOMAML, ANIL, BOIL, Meta-SGD (Finn et al. 2017, algorithm 1, line 8)."""

    proximal = 0.0
    differentiates_twice = False

    def __call__(self, problem: InnerProblem) -> Outcome:
        adapted, support_losses = run(problem)
        losses, outputs = problem.query(adapted)
        return Outcome(losses.sum(), losses.detach(), detached(outputs), support_losses)


@dataclass(frozen=True)
class Displacement:
    """½‖θ - φ_K‖², φ_K held constant, whose gradient is θ - φ_K: Reptile (Nichol et al. 2018, algorithm 2)."""

    proximal = 0.0
    differentiates_twice = False

    def __call__(self, problem: InnerProblem) -> Outcome:
        adapted, support_losses = run(problem)
        constant = {name: value.detach() for name, value in adapted.items()}
        scalar: Any = sum(squares(problem.start[name] - value).sum() / 2 for name, value in constant.items())
        with torch.no_grad():
            losses, outputs = problem.query(constant)
        return Outcome(scalar, losses, outputs, support_losses)


@dataclass(frozen=True)
class MultiStepLoss:
    """Σₖ wₖ L(φₖ; query), k = 1 … K, annealed to the last step (Antoniou et al. 2019, section 4.1).

    The weights start at 1/K each; over `iterations` outer steps all but the last fall to 0.03/K and the
    last takes what they give up, so that they always sum to 1. Keeps K query graphs in memory at once.
    """

    iterations: int
    proximal = 0.0
    differentiates_twice = False

    def __post_init__(self):
        positive("iterations of the multi-step loss", self.iterations, integer=True)

    def weights(self, steps: int, iteration: int) -> list[float]:
        """The weights of steps 1 … K at an outer iteration, from 0."""
        early = max((1 - iteration / self.iterations) / steps, 0.03 / steps)
        return [early] * (steps - 1) + [1 - (steps - 1) * early]

    def __call__(self, problem: InnerProblem) -> Outcome:
        weights = self.weights(problem.steps, problem.iteration)
        scalar: Any = 0.0
        support_losses = []
        for weight, (adapted, loss) in zip(weights, problem.path()):
            support_losses.append(loss)
            losses, outputs = problem.query(adapted, step=len(support_losses))
            scalar = scalar + weight * losses.sum()
        return Outcome(scalar, losses.detach(), detached(outputs), torch.stack(support_losses))


@dataclass(frozen=True)
class Implicit:
    """The implicit gradient (I + H/λ)⁻¹ ∇L(φ_K; query), H the Hessian of the support loss at φ_K.

    iMAML by conjugate gradients (Rajeswaran et al. 2019, eq. 6, algorithm 2). The inner problem has the term
    λ/2 ‖φ - θ‖²; the answer is exact only as far as the inner loop has reached its minimum. All
    meta-learned parameters must adapt, else an `InputError`. One Hessian-vector product a conjugate gradient
    step, no inner graph.

    strength: λ of the inner problem. damping: solve with H/(λ + damping) instead, as the paper's code does; 0 is
        eq. 6. Short of the minimum H has negative curvature, which eq. 6 magnifies hundreds of times at a
        small λ; and it takes from the meta-gradient what says that θ has become too steep for the inner loop.
    """

    strength: float
    cg_steps: int = 5
    damping: float = 0.0
    differentiates_twice = True

    def __post_init__(self):
        positive("the proximal strength λ", self.strength)
        positive("cg_steps", self.cg_steps, integer=True)
        if self.damping != 0:
            positive("the damping of the implicit gradient, if not 0,", self.damping)

    @property
    def proximal(self) -> float:
        return self.strength

    def __call__(self, problem: InnerProblem) -> Outcome:
        still = set(problem.learner.meta_learned) - set(problem.start)
        if still:
            raise InputError(
                f"the implicit gradient needs every meta-learned parameter to adapt: {min(still)!r} does not"
            )
        if any(value.is_complex() for value in problem.start.values()):
            raise InputError("the implicit gradient is of real parameters, and one that adapts is complex")
        adapted, support_losses = run(problem)
        point = {name: value.detach().requires_grad_() for name, value in adapted.items()}
        values = list(point.values())
        losses, outputs = problem.query(point)
        right = torch.autograd.grad(losses.sum(), values, allow_unused=True, materialize_grads=True)
        support = problem.support_losses(point, True, problem.steps, proximal=False).sum()
        slope = torch.autograd.grad(
            support, values, create_graph=True, allow_unused=True, materialize_grads=True
        )

        def product(vector):
            curved = torch.autograd.grad(
                slope, values, vector, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return [v + c / (self.strength + self.damping) for v, c in zip(vector, curved)]

        solved = conjugate_gradients(product, right, self.cg_steps, int(problem.stacked))
        scalar = sum((value * problem.start[name]).sum() for name, value in zip(point, solved))
        return Outcome(scalar, losses.detach(), detached(outputs), support_losses)


def conjugate_gradients(product, right, steps: int, lead: int = 0) -> list[Tensor]:
    """Solve A x = right by `steps` steps from zero, for lists of tensors; one system per task if `lead` is 1.

    product: x → A x, A symmetric. Negative curvature is followed to where the residual vanishes, as A asks for.
    """

    def dot(a, b):
        return sum((x * y).flatten(lead).sum(-1) if x.dim() > lead else x * y for x, y in zip(a, b))

    def plus(a, scale, b):
        return [x + scale.view(scale.shape + (1,) * (y.dim() - lead)) * y for x, y in zip(a, b)]

    def ratio(a, b):  # 0 / 0 is a system that is solved already: leave it as it is
        return torch.where(b != 0, a / b.where(b != 0, 1.0), 0.0)

    solution = [torch.zeros_like(r) for r in right]
    residual = direction = list(right)
    square = dot(residual, residual)
    for _ in range(steps):
        image = product(direction)
        size = ratio(square, dot(direction, image))
        solution, residual = plus(solution, size, direction), plus(residual, -size, image)
        following = dot(residual, residual)
        direction = plus(residual, ratio(following, square), direction)
        square = following
    return solution


def detached(outputs: Tree) -> Tree:
    """The same without the graph that they were computed by."""
    return mapped(Tensor.detach, outputs)


def squares(values: Tensor) -> Tensor:
    """|x|² of each element."""
    return (values * values.conj()).real if values.is_complex() else values.square()


def run(problem: InnerProblem) -> tuple[Adapted, Tensor]:
    """φ_K and the support losses by step; earlier φ are let go on the way."""
    adapted, losses = problem.start, []
    for adapted, loss in islice(problem.path(), problem.steps):
        losses.append(loss)
    return adapted, torch.stack(losses)
