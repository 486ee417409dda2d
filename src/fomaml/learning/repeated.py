"""The inner steps of one task after the first, without what the first has looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from fomaml.learning.contracts import Learner
from fomaml.learning.forward import called
from fomaml.learning.mistakes import checked_loss, checked_outputs, targets_for
from fomaml.learning.replica import Replicas
from fomaml.models import BatchNorm, normalising
from fomaml.tasks import Task

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

    A second step of the same shapes and dtypes fails in no way that the first does not. A forward pass of the user's
    may do anything: its outputs are looked at again where they have other shapes. The modules hold what the first step
    has given them, see `Replicas.staying`. Of a criterion of the user's the losses are as they were.
    """
    learner, replicas = problem.learner, problem.replicas
    replicas.keep()
    criterion = learner.criterion
    asks = learner.loss, learner.output, learner.inner_batch_size, learner.inner_accumulate
    if (
        problem.stacked
        or not replicas.are_kept
        or any(each is not None for each in asks)
        or learner.objective.proximal
        or getattr(criterion, "__module__", "") != F.__name__
    ):
        return losses
    assert criterion is not None
    inputs, targets = problem.task.support
    fixed = {name: parameter.detach() for name, parameter in problem.fixed.items()}
    buffers = replicas.have_buffers
    norms = any(isinstance(module, BatchNorm) for module in replicas.modules)

    def told(step: int) -> AbstractContextManager:
        return normalising(step=step, running=problem.evaluating or None) if norms else nullcontext()

    known: list[tuple] = [(None, targets)]  # what outputs are like, and the targets for them

    def losses_again(adapted: Mapping[str, Tensor], constant: bool, step: int) -> Any:
        if step == 0:
            return losses(adapted, constant, step)
        found = replicas.make({**fixed, **adapted, **problem.buffers})
        with told(step), problem.attention():
            outputs = checked_outputs(called(found[0], learner.model, inputs), criterion)
        if buffers:
            replicas.assigned(found, problem.buffers)
        like = outputs.shape, outputs.dtype
        if known[0][0] != like:
            known[0] = like, targets_for(criterion, outputs, targets)
        return checked_loss(criterion(outputs, known[0][1]))

    return losses_again
