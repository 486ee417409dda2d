"""The inner steps of one task after the first, without what the first has looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from fomaml.learning.contracts import Learner
from fomaml.learning.mistakes import as_numbers
from fomaml.learning.replica import Replicas
from fomaml.models import normalising
from fomaml.tasks import Task
from fomaml.trees import call

Losses = Callable[[Mapping[str, Tensor], bool, int], Any]  # see `inner_loop`


class Repeating(Protocol):
    """What a `Problem` has of which a step is repeated."""

    learner: Learner
    task: Task
    replicas: Replicas
    stacked: bool
    evaluating: bool
    fixed: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def attention(self) -> AbstractContextManager: ...


def again(problem: Repeating, losses: Losses) -> Losses:
    """The losses of inner steps whose φ stays in its place, see `inner_loop`: of small networks in four fifths of the
    time.

    A second step of the same shapes and dtypes fails in no way that the first does not, unless what runs in it is the
    user's, which may do anything: then they are as they were.
    """
    learner, replicas = problem.learner, problem.replicas
    replicas.keep()
    criterion = learner.criterion
    asks = learner.loss, learner.output, learner.inner_batch_size, learner.inner_accumulate
    if (
        problem.stacked
        or any(each is not None for each in asks)
        or learner.objective.proximal
        or not replicas.all_kept
        or getattr(criterion, "__module__", "") != F.__name__
    ):
        return losses
    inputs, targets = problem.task.support
    fixed = {name: parameter.detach() for name, parameter in problem.fixed.items()}

    def losses_again(adapted: Mapping[str, Tensor], constant: bool, step: int) -> Any:
        if step == 0:
            return losses(adapted, constant, step)
        found = replicas.make({**fixed, **adapted, **problem.buffers})
        with normalising(step=step, running=problem.evaluating or None), problem.attention():
            outputs = call(found[0], inputs)
        replicas.assigned(found, problem.buffers)
        assert criterion is not None
        return criterion(outputs, as_numbers(criterion, outputs, targets))

    return losses_again
