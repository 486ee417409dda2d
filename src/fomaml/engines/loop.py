"""One task after the other: any module, the memory of one task."""

from __future__ import annotations

from fomaml.learning.learner import MetaLearner
from fomaml.learning.problem import Problem
from fomaml.tasks import Task, one


def problem(
    learner: MetaLearner,
    tasks: Task,
    *,
    evaluating: bool = False,
    ways: int | None = None,
    measured: bool = False,
) -> Problem:
    """The problem of a batch of a single task. A plan has tried the learner: it is not watched again."""
    return Problem(learner, one(tasks, 0), evaluating=evaluating, ways=ways, watched=False, measured=measured)
