"""All tasks at once: vmap adds the task axis to the forward pass, plain autograd differentiates it.

No `torch.func.grad` inside: tasks are independent, so the gradient of the summed losses by a stack of
parameters is the stack of the gradients. That is leaner, and leaves the backward formulas alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from fomaml.engines.common import chunk_size
from fomaml.learner import MetaLearner, Problem
from fomaml.tasks import Task, chunks


def problems(
    learner: MetaLearner, tasks: Task, tasks_at_once: int | None = None, evaluating: bool = False
) -> Iterator[Problem]:
    for chunk in chunks(tasks, chunk_size(tasks, tasks_at_once)):
        yield Problem(learner, chunk, stacked=True, evaluating=evaluating)
