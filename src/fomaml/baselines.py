"""What meta-learning is measured against on the same tasks: fine-tuning, a pretrained classifier, centroids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.choices import Statistics
from fomaml.data.source import ClassSource
from fomaml.episodes import TaskSequence, copies_of, ways_of
from fomaml.errors import positive, whole
from fomaml.evaluate import batches, evaluate, judged
from fomaml.learning.algorithms import FOMAML
from fomaml.tasks import Task


def nearest_centroid(episodes: TaskSequence, *, tasks: int = 1000, tasks_at_once: int = 100) -> Tensor:
    """(tasks,) accuracies of the class whose mean support input is nearest, in Euclidean distance."""
    found = []
    for batch in batches(episodes, tasks, tasks_at_once):
        support, query = batch.support.inputs.flatten(2), batch.query.inputs.flatten(2)
        members = F.one_hot(batch.support.targets).to(support.dtype)  # (tasks, examples, ways)
        centroids = members.mT @ support / members.sum(1).unsqueeze(-1)
        nearness = -torch.cdist(query, centroids)
        found.append(judged(episodes, nearness, batch.query.targets).cpu())
    return torch.cat(found)


class Tuned(NamedTuple):
    """A baseline's (tasks,) scores, and the inner step size and count chosen on training classes."""

    scores: Tensor
    inner_lr: float
    steps: int


def fine_tune(
    model: nn.Module | Callable[[int], nn.Module],
    tuning_episodes: TaskSequence,
    episodes: TaskSequence,
    *,
    tasks: int = 1000,
    tuning_tasks: int = 100,
    inner_lrs: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1),
    at_steps: Sequence[int] = (5, 20, 50, 100),
    statistics: Statistics = "own",
) -> Tuned:
    """Train a model on each support set by gradient descent; step size and count tuned on other episodes.

    statistics: as in `evaluate`.
    model: the start for every task, or a function from a number to a fresh random start: then every
        hundred tasks get a start of their own.
    """

    def run(
        episodes: TaskSequence, tasks: int, inner_lr: float, at_steps: Sequence[int]
    ) -> dict[int, Tensor]:
        parts = []
        for number in range(math.ceil(tasks / 100)):
            start = model if isinstance(model, nn.Module) else model(number)
            learner = FOMAML(start, inner_lr, max(at_steps))
            part = _Slice(episodes, 100 * number)
            few = min(100, tasks - 100 * number)
            parts.append(evaluate(learner, part, tasks=few, at_steps=at_steps, statistics=statistics))
        return {steps: torch.cat([part[steps] for part in parts]) for steps in at_steps}

    best = max(
        (found.mean().item(), -steps, inner_lr)
        for inner_lr in inner_lrs
        for steps, found in run(tuning_episodes, tuning_tasks, inner_lr, at_steps).items()
    )
    inner_lr, steps = best[2], -best[1]
    return Tuned(run(episodes, tasks, inner_lr, [steps])[steps], inner_lr, steps)


def pretrain(
    model: nn.Module,
    source: ClassSource,
    *,
    iterations: int = 1000,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
) -> nn.Module:
    """Train `model`, in place, as an ordinary classifier of all the classes of `source` (Adam, cross-entropy)."""
    iterations = positive("iterations", iterations, integer=True)
    batch_size = positive("batch_size", batch_size, integer=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=positive("lr", lr))
    random = torch.Generator().manual_seed(whole("seed", seed))
    labels = source.labels()
    for _ in range(iterations):
        rows = torch.randint(len(labels), (batch_size,), generator=random)
        inputs = source.take(rows)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels[rows].to(inputs.device)).backward()
        optimizer.step()
    return model


class _Slice:
    """Episodes from `start` on."""

    def __init__(self, episodes: TaskSequence, start: int):
        self.episodes, self.start = episodes, start
        self.ways, self.copies = ways_of(episodes), copies_of(episodes)

    def batch(self, start: int, tasks: int) -> Task:
        return self.episodes.batch(self.start + start, tasks)
