"""All tasks at once: vmap adds the task axis to the forward pass, plain autograd differentiates it.

No `torch.func.grad` inside: tasks are independent, so the gradient of the summed losses by a stack of
parameters is the stack of the gradients. That is leaner, and leaves the backward formulas alone.
"""

from __future__ import annotations

from fomaml.learning.learner import MetaLearner
from fomaml.learning.problem import Problem
from fomaml.tasks import Task


def problem(
    learner: MetaLearner, tasks: Task, *, evaluating: bool = False, ways: int | None = None
) -> Problem:
    """The problem of a stack of tasks."""
    return Problem(learner, tasks, stacked=True, evaluating=evaluating, ways=ways)
