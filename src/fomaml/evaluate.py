"""Adaptation to unseen tasks: the curve over inner steps, its 95 % intervals, and baselines on the same tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.algorithms import FOMAML
from fomaml.data.source import ClassSource
from fomaml.engines import curve_at
from fomaml.errors import InputError, positive
from fomaml.learner import MetaLearner
from fomaml.tasks import Task
from fomaml.train import check_width, scores

SCALINGS = 200  # of rows and columns each; after 100 one of 13 500 images of Omniglot still changed its class


class Estimate(NamedTuple):
    """A mean over tasks and the half-width of its 95 % interval (normal, 1.96 standard errors)."""

    mean: float
    interval: float


def estimate(values: Tensor) -> Estimate:
    """The mean of (tasks,) independent values with its interval; one value has an interval of nan."""
    values = values.double()
    error = values.std(correction=1).item() if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), 1.96 * error / math.sqrt(len(values)))


def evaluate(
    learner: MetaLearner,
    episodes,
    *,
    tasks: int = 1000,
    at_steps: Sequence[int] = (0, 1, 5, 10, 20),
    inductive: bool | str = False,
    balanced: bool = False,
    tasks_at_once: int = 100,
    engine: str = "auto",
) -> dict[int, Tensor]:
    """Adapt to the first `tasks` episodes; per number of inner steps the (tasks,) float64 scores.

    A score is the accuracy in [0, 1], or the loss where targets are floating. `estimate` sums one up.
    Of episodes with copies of each image, a query image's outputs are averaged over its copies (test-time augmentation;
    Krizhevsky et al. 2012 average over crops).
    inductive: `BatchNorm` takes its statistics from the support set, so that query examples do not
    inform each other; or, "with-query", from the support set and one query example at a time (the
    published code of Nichol et al. 2018); otherwise from the query set as a whole (transductive).
    balanced: take it for known that a query set holds as many examples of each class, see `balance`.

    Raises:
        InputError: a model whose output is narrower than the number of ways; balanced, and the queries are not.
    """
    points = [(steps, inductive) for steps in at_steps]
    found = evaluate_at(learner, episodes, points, tasks, tasks_at_once, engine, balanced)
    return {steps: scores for (steps, _), scores in found.items()}


def evaluate_at(
    learner: MetaLearner,
    episodes,
    points: Sequence[tuple[int, bool | str]],
    tasks: int = 1000,
    tasks_at_once: int = 100,
    engine: str = "auto",
    balanced: bool = False,
) -> dict[tuple[int, bool | str], Tensor]:
    """`evaluate` at pairs of steps and inductive: tasks are adapted once for all of them."""
    check_width(learner, episodes)
    points = sorted(dict.fromkeys(points), key=lambda point: point[0])
    parts: list[list[Tensor]] = [[] for _ in points]
    for batch in _batches(episodes, tasks, max(1, tasks_at_once // _copies(episodes))):
        found = curve_at(learner, batch, points, engine)
        for part, (losses, outputs) in zip(parts, found):
            part.append(_scores(episodes, outputs, batch.query.targets, losses, balanced).double().cpu())
    return dict(zip(points, map(torch.cat, parts)))


def balance(outputs: Tensor, targets: Tensor) -> Tensor:
    """(tasks, examples, ways) log-probabilities, of logits, given that each class occurs equally often in a task.

    Rows and columns of the probabilities are scaled in turn to equal sums (Sinkhorn and Knopp 1967; on query sets:
    Hu, Gripon and Pateux 2021, PT-MAP). So an example that fits two classes goes where one is missing. Query sets of
    benchmarks are balanced, those of an application seldom (Veilleux et al. 2021).

    targets: (tasks, examples) labels from 0. They serve to check that the tasks are balanced.

    Raises:
        InputError: targets that are no labels, or classes that do not occur equally often.
    """
    if targets.is_floating_point() or outputs.dim() != 3:
        raise InputError("balanced needs one label for each example, got targets of another kind")
    ways = int(targets.max()) + 1
    counts = F.one_hot(targets, ways).sum(1)
    if counts.min() != counts.max():
        raise InputError(
            f"balanced needs as many query examples of each class, got {counts.min()} to {counts.max()}"
        )
    assigned = outputs[..., :ways].to(torch.promote_types(outputs.dtype, torch.float32))
    for _ in range(SCALINGS):
        assigned = assigned.log_softmax(1).log_softmax(2)
    return assigned


def nearest_centroid(episodes, *, tasks: int = 1000, tasks_at_once: int = 100) -> Tensor:
    """(tasks,) accuracies of the class whose mean support input is nearest, in Euclidean distance."""
    found = []
    for batch in _batches(episodes, tasks, tasks_at_once):
        support, query = batch.support.inputs.flatten(2), batch.query.inputs.flatten(2)
        members = F.one_hot(batch.support.targets).to(support.dtype)  # (tasks, examples, ways)
        centroids = members.mT @ support / members.sum(1).unsqueeze(-1)
        nearness = -torch.cdist(query, centroids)
        found.append(_scores(episodes, nearness, batch.query.targets).cpu())
    return torch.cat(found)


class Tuned(NamedTuple):
    """A baseline's (tasks,) scores, and the inner step size and count chosen on training classes."""

    scores: Tensor
    inner_lr: float
    steps: int


def fine_tune(
    model: nn.Module | Callable[[int], nn.Module],
    tuning_episodes,
    episodes,
    *,
    tasks: int = 1000,
    tuning_tasks: int = 100,
    inner_lrs: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1),
    at_steps: Sequence[int] = (5, 20, 50, 100),
    inductive: bool | str = False,
) -> Tuned:
    """Train a model on each support set by gradient descent; step size and count tuned on other episodes.

    inductive: as in `evaluate`.
    model: the start for every task, or a function from a number to a fresh random start: then every
        hundred tasks get a start of their own.
    """
    fixed = isinstance(model, nn.Module)

    def run(episodes, tasks, inner_lr, at_steps):
        parts = []
        for number in range(math.ceil(tasks / 100)):
            start = model if fixed else model(number)
            learner = FOMAML(start, inner_lr, max(at_steps))
            part = _Slice(episodes, 100 * number)
            few = min(100, tasks - 100 * number)
            parts.append(evaluate(learner, part, tasks=few, at_steps=at_steps, inductive=inductive))
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
    positive("iterations", iterations, integer=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    random = torch.Generator().manual_seed(seed)
    labels = source.labels()
    for _ in range(iterations):
        rows = torch.randint(len(labels), (batch_size,), generator=random)
        inputs = source.take(rows)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels[rows].to(inputs.device)).backward()
        optimizer.step()
    return model


def _copies(episodes) -> int:
    return getattr(episodes, "copies", 1)


def _scores(
    episodes, outputs: Tensor, targets: Tensor, losses: Tensor | None = None, balanced: bool = False
) -> Tensor:
    """`scores`, of outputs that are averaged over the copies of a query image, and balanced if asked for."""
    copies = _copies(episodes)
    if copies > 1:
        outputs, targets = outputs.unflatten(1, (-1, copies)).mean(2), targets[:, ::copies]
    if balanced:
        outputs = balance(outputs, targets)
    return scores(outputs, targets, losses)


def _batches(episodes, tasks: int, tasks_at_once: int) -> Iterator[Task]:
    positive("tasks", tasks, integer=True)
    for start in range(0, tasks, tasks_at_once):
        yield episodes.batch(start, min(tasks_at_once, tasks - start))


class _Slice:
    """Episodes from `start` on."""

    def __init__(self, episodes, start: int):
        self.episodes, self.start = episodes, start
        self.ways, self.copies = episodes.ways, _copies(episodes)

    def __getitem__(self, index: int) -> Task:
        return self.episodes[self.start + index]

    def batch(self, start: int, tasks: int) -> Task:
        return self.episodes.batch(self.start + start, tasks)
