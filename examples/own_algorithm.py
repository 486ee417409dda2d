"""An algorithm of your own: an inner optimiser, an objective, and one short function that composes them.

Here the inner gradients are clipped element by element, and the meta-loss asks φ_K to fit the support set too.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fomaml import FOMAML, MLP, RegressionEpisodes, Sinusoids, estimate, evaluate, train
from fomaml.learning.objectives import Outcome, run


@dataclass(frozen=True)
class Clipped:
    """The inner step's direction out of the gradient, which may be differentiated; no state outlives a task."""

    limit: float = 1.0
    second_order, carried, elementwise = True, False, True

    def direction(self, gradient, parameter, state, step):
        return gradient.clamp(-self.limit, self.limit)


def both_losses(problem) -> Outcome:
    """L(φ_K; query) + L(φ_K; support)."""
    adapted, support_losses = run(problem)
    losses, outputs = problem.query(adapted)
    scalar = losses + problem.support_losses(adapted, False, problem.steps)
    return Outcome(scalar.sum(), losses.detach(), outputs.detach(), support_losses)


def ClippedMAML(model, inner_lr, inner_steps, criterion, **choices):
    return FOMAML(
        model, inner_lr, inner_steps, criterion, optimizer=Clipped(), objective=both_losses, **choices
    )


def main():
    torch.manual_seed(0)
    # The check: in second order the meta-gradient is the derivative of `learner(tasks)`, as finite differences see it.
    tasks = RegressionEpisodes(Sinusoids(), shots=10, query_shots=10).batch(0, 4).to(dtype=torch.float64)
    learner = ClippedMAML(MLP(1, 8, 1).double(), 0.01, 2, F.mse_loss, first_order=False)
    inputs = list(learner.parameters())
    assert torch.autograd.gradcheck(lambda *_: learner(tasks), inputs, fast_mode=True)

    learner = ClippedMAML(MLP(1, 40, 40, 1), inner_lr=0.05, inner_steps=5, criterion=F.mse_loss)
    episodes, unseen = (RegressionEpisodes(Sinusoids(), shots=10, query_shots=10, seed=s) for s in (0, 1))
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    for stage in ("before", "after"):
        error = estimate(evaluate(learner, unseen, tasks=300, at_steps=[10])[10])
        print(f"{stage} meta-training: error {error.mean:.2f} ± {error.interval:.2f} on unseen tasks")
        if stage == "before":
            list(train(learner, episodes, optimizer, iterations=200, meta_batch_size=25))


if __name__ == "__main__":
    main()
