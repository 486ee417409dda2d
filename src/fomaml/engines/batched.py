"""All tasks at once: vmap adds the task axis to the forward pass, plain autograd differentiates it.

No `torch.func.grad` inside: tasks are independent, so the gradient of the summed losses by a stack of
parameters is the stack of the gradients. That is leaner, and leaves the backward formulas alone.
"""

from __future__ import annotations

from fomaml.errors import InputError
from fomaml.learning.learner import MetaLearner
from fomaml.learning.problem import Problem
from fomaml.tasks import Task


def problem(
    learner: MetaLearner, tasks: Task, *, evaluating: bool = False, ways: int | None = None
) -> Problem:
    """The problem of a stack of tasks.

    Raises:
        InputError: a module with hooks of the backward pass.
    """
    refuse_hooks(learner)
    return Problem(learner, tasks, stacked=True, evaluating=evaluating, ways=ways)


def refuse_hooks(learner: MetaLearner) -> None:
    """Raise `InputError` for a module with hooks of the backward pass, which do not run under vmap."""
    for name, module in learner.model.named_modules():
        own = vars(module)
        if own.get("_backward_hooks") or own.get("_backward_pre_hooks"):
            raise InputError(
                f"the module {name!r} has a hook of the backward pass, which does not run under vmap: engine='loop'"
            )
