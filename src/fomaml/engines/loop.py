"""One task after the other: any module, the memory of one task."""

from __future__ import annotations

from collections.abc import Iterator

from fomaml.learner import MetaLearner, Problem
from fomaml.tasks import Task, count, one


def problems(
    learner: MetaLearner, tasks: Task, tasks_at_once: int | None = None, evaluating: bool = False
) -> Iterator[Problem]:
    for index in range(count(tasks)):
        yield Problem(learner, one(tasks, index), evaluating=evaluating)
