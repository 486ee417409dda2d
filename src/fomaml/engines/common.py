"""What the engines share: the result, and the walk over a meta-batch in chunks of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from fomaml.learner import MetaLearner, Problem
from fomaml.tasks import Task, count


class MetaGradient(NamedTuple):
    """gradients: by meta-parameter name, the mean over tasks; zeros where nothing depends on it.

    query_losses: (tasks,) at φ_K. support_losses: (tasks, steps), each at the start of its step.
    query_outputs: (tasks, query examples, ...) at φ_K. engine: the engine that computed it.
    """

    gradients: dict[str, Tensor]
    query_losses: Tensor
    support_losses: Tensor
    query_outputs: Tensor
    engine: str

    def apply_to(self, learner: MetaLearner) -> None:
        """Set `.grad` of the learner's meta-parameters, for any `torch.optim` optimiser to step on."""
        for name, parameter in learner.meta_parameters().items():
            parameter.grad = self.gradients[name]


def accumulate(learner: MetaLearner, problems: Iterable[Problem], tasks: int, engine: str) -> MetaGradient:
    """Sum the gradients of each problem's scalar, one problem in memory at a time, and divide by `tasks`."""
    parameters = learner.meta_parameters()
    totals: list[Tensor | None] = [None] * len(parameters)
    query_losses, support_losses, outputs = [], [], []
    for problem in problems:
        outcome = learner.objective(problem)
        gradients = torch.autograd.grad(outcome.scalar, list(parameters.values()), allow_unused=True)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                # not in place: autograd may hand two parameters the same tensor
                totals[i] = gradient if totals[i] is None else totals[i] + gradient
        lead = problem.stacked
        query_losses.append(outcome.query_losses if lead else outcome.query_losses[None])
        support_losses.append(outcome.support_losses.T if lead else outcome.support_losses[None])
        outputs.append(outcome.query_outputs if lead else outcome.query_outputs[None])
    gradients = {
        name: torch.zeros_like(p) if total is None else total / tasks
        for (name, p), total in zip(parameters.items(), totals)
    }
    return MetaGradient(
        gradients, torch.cat(query_losses), torch.cat(support_losses), torch.cat(outputs), engine
    )


def curves(
    problems: Iterable[Problem], at_steps: Sequence[int], inductive: bool
) -> list[tuple[Tensor, Tensor]]:
    """For each number of steps: query losses (tasks,) and outputs (tasks, examples, ...), no graph kept."""
    parts: list[list] = [[] for _ in at_steps]
    for problem in problems:
        path = problem.path(first_order=True)
        adapted, done = problem.start, 0
        for part, steps in zip(parts, at_steps):
            for adapted, _ in islice(path, steps - done):
                pass
            done = steps
            buffers = problem.buffers  # a look at the query set must not change later steps
            problem.buffers = {name: buffer.clone() for name, buffer in buffers.items()}
            with torch.no_grad():
                losses, outputs = problem.query(adapted, inductive)
            problem.buffers = buffers
            part.append((losses, outputs) if problem.stacked else (losses[None], outputs[None]))
    return [tuple(map(torch.cat, zip(*part))) for part in parts]


def chunk_size(tasks: Task, tasks_at_once: int | None) -> int:
    return count(tasks) if tasks_at_once is None else tasks_at_once
