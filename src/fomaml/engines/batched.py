"""All tasks at once: vmap adds the task axis to the forward pass, plain autograd differentiates it.

No `torch.func.grad` inside: tasks are independent, so the gradient of the summed losses by a stack of
parameters is the stack of the gradients. That is leaner, and leaves the backward formulas alone.
"""

from __future__ import annotations

from fomaml.errors import InputError
from fomaml.learning.learner import MetaLearner
from fomaml.learning.problem import Problem
from fomaml.models import NATIVE_NORMS, takes_statistics
from fomaml.tasks import Task


def problem(
    learner: MetaLearner,
    tasks: Task,
    *,
    evaluating: bool = False,
    ways: int | None = None,
    measured: bool = False,
) -> Problem:
    """The problem of a stack of tasks.

    Raises:
        InputError: a module with hooks of the backward pass, or with norms that a `loss` must not differentiate under
            vmap.
    """
    refuse_hooks(learner)
    refuse_norms(learner)
    return Problem(learner, tasks, stacked=True, evaluating=evaluating, ways=ways, measured=measured)


def refuse_hooks(learner: MetaLearner) -> None:
    """Raise `InputError` for a module with hooks of the backward pass, which do not run under vmap."""
    for name, module in learner.model.named_modules():
        own = vars(module)
        if own.get("_backward_hooks") or own.get("_backward_pre_hooks"):
            raise InputError(
                f"the module {name!r} has a hook of the backward pass, which does not run under vmap: engine='loop'"
            )


def refuse_norms(learner: MetaLearner) -> None:
    """Raise `InputError` where a loss of one's own may differentiate a batch norm of torch's under vmap.

    Some such gradients by the inputs were seen to be wrong without an error, by 0.6 % in first order. Those that were
    tried on torch 2.14 agree with the loop to 1e-15, and there is no telling which others do.
    """
    if learner.loss is None:
        return
    for name, module in learner.model.named_modules():
        if isinstance(module, NATIVE_NORMS) and takes_statistics(module):
            raise InputError(
                f"loss= under vmap does not go with the {type(module).__name__} {name!r}: engine='loop', or "
                "fomaml.convert_batch_norm(model)"
            )
