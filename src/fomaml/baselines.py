"""What meta-learning is measured against on the same tasks: fine-tuning, pooled training, centroids, estimators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.choices import Statistics
from fomaml.data.groups import GroupSource
from fomaml.data.source import ClassSource
from fomaml.episodes import TaskSequence, copies_of, ways_of
from fomaml.errors import InputError, positive, whole
from fomaml.evaluate import batches, evaluate, judged
from fomaml.learning.algorithms import FOMAML
from fomaml.learning.contracts import Criterion
from fomaml.learning.learner import Choices
from fomaml.metrics import Asked, Metric, metric_for
from fomaml.scoring import metrics_of
from fomaml.streams import check_sequence
from fomaml.tasks import Batch, Task, are_labels, one, singles
from fomaml.trees import Tree, call, leaves, mapped

if TYPE_CHECKING:
    from typing_extensions import Unpack


def nearest_centroid(
    episodes: TaskSequence, *, tasks: int = 1000, tasks_at_once: int = 100, metric: Asked = "accuracy"
) -> Tensor:
    """(tasks,) float64 scores of the class whose mean support input is nearest, in Euclidean distance.

    metric: as in `evaluate`, of outputs that are the distances times -1; there is no loss. Labels of -100 are left out.

    Raises:
        InputError: targets that are no labels, one for each example.
    """
    found = []
    score = metric_for(F.cross_entropy, metric)
    for batch in batches(episodes, tasks, tasks_at_once, nn.Identity()):
        for own in [batch] if isinstance(batch, Task) else singles(batch):
            scored = judged(episodes, score, _nearness(own), own.query.targets)
            found.append(scored.double().cpu())
    return torch.cat(found)


def _nearness(tasks: Task) -> Tensor:
    """(tasks, query examples, ways) distances to the mean support input of each class, times -1."""
    if not isinstance(tasks.support.inputs, Tensor):
        raise InputError("the nearest centroid needs one tensor of inputs, and these are nested")
    support, query = tasks.support.inputs.flatten(2), tasks.query.inputs.flatten(2)
    members = _members(tasks.support.targets).to(support.dtype)
    number = members.sum(1).unsqueeze(-1)
    centroids = members.mT @ support / number.clamp(min=1)
    # a class that a task lacks beside others is none of its own
    return -torch.cdist(query, centroids).masked_fill(number.mT == 0, math.inf)


def _members(targets: Tree) -> Tensor:
    """(tasks, examples, ways) ones where an example is of a class, of labels (tasks, examples)."""
    if not are_labels(targets) or targets.dim() != 2:
        raise InputError("the nearest centroid needs one label for each example, got targets of another kind")
    if not (targets >= 0).any():
        raise InputError("the nearest centroid needs labels from 0 on, got none")
    return F.one_hot(targets.clamp(min=-1) + 1)[..., 1:]


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
    criterion: Criterion | None = None,
    metric: Asked = None,
    **choices: Unpack[Choices],
) -> Tuned:
    """Train a model on each support set by gradient descent; step size and count tuned on other episodes.

    choices: further arguments of `FOMAML`, such as `loss`, `output`, or `adapted` for the last layers alone.
    statistics, metric: as in `evaluate`; the best is tuned for in the metric's direction.
    model: the start for every task, or a function from a number to a fresh random start: then every
        hundred tasks get a start of their own.
    """

    score: Metric | None = None

    def run(
        episodes: TaskSequence, tasks: int, inner_lr: float, at_steps: Sequence[int]
    ) -> dict[int, Tensor]:
        parts = []
        for number in range(math.ceil(tasks / 100)):
            start = model if isinstance(model, nn.Module) else model(number)
            nonlocal score
            learner = FOMAML(start, inner_lr, max(1, *at_steps), criterion, **choices)
            [score] = metrics_of(learner, [metric])
            part = _Slice(episodes, 100 * number)
            few = min(100, tasks - 100 * number)
            found = evaluate(learner, part, tasks=few, at_steps=at_steps, statistics=statistics, metric=score)
            parts.append(found)
        return {steps: torch.cat([part[steps] for part in parts]) for steps in at_steps}

    def worth(found: Tensor) -> float:
        mean = found.mean().item()
        assert score is not None  # once something was run
        return -math.inf if math.isnan(mean) else score.direction * mean  # nan: it has diverged

    best = max(
        (worth(found), -steps, inner_lr)
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


def pool(
    model: nn.Module,
    source: GroupSource,
    *,
    iterations: int = 1000,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    criterion: Criterion | None = None,
) -> nn.Module:
    """Train `model`, in place, on the rows of all groups together, as if there were no tasks (Adam).

    criterion: by default the cross-entropy, or of regression the mean squared error.
    """
    iterations = positive("iterations", iterations, integer=True)
    batch_size = positive("batch_size", batch_size, integer=True)
    if criterion is None:
        criterion = F.cross_entropy if source.kind == "classification" else F.mse_loss
    optimizer = torch.optim.Adam(model.parameters(), lr=positive("lr", lr))
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(whole("seed", seed))
    for _ in range(iterations):
        positions = torch.randint(len(source.rows), (batch_size,), generator=random)
        inputs, targets = (mapped(lambda t: t.to(device), part) for part in source.take(positions.numpy()))
        optimizer.zero_grad()
        criterion(call(model, inputs), targets).backward()
        optimizer.step()
    return model


def of_estimator(
    make: Callable[[], Any],
    episodes: TaskSequence,
    *,
    tasks: int = 1000,
    metric: Asked,
    pooled: GroupSource | None = None,
) -> Tensor:
    """(tasks,) float64 scores of an estimator in the manner of scikit-learn, fitted anew on each support set.

    make: gives one that is not fitted. It sees the numbers of an example in one row, whatever their nesting. Classes
        have the probabilities that it gives, of a regressor outputs have the targets' shape.
    pooled: rows that it is fitted on beside the support set, those of training tasks.
    metric: as in `evaluate`; there is no loss.
    """
    score = metric_for(F.cross_entropy if ways_of(episodes) is not None else F.mse_loss, metric)
    beside = None if pooled is None else pooled.take(np.arange(len(pooled.rows)))
    found = []
    for batch in batches(episodes, tasks, 100, nn.Identity()):
        for task in singles(batch):
            support, query = one(task, 0)
            inputs, targets = _as_rows(support.inputs), support.targets.cpu().numpy()
            if beside is not None:
                inputs = np.concatenate([_as_rows(beside[0]), inputs])
                targets = np.concatenate([beside[1].cpu().numpy(), targets])
            fitted = make().fit(inputs, targets.squeeze(1) if targets.shape[1:] == (1,) else targets)
            outputs = _predicted(fitted, _as_rows(query.inputs), query.targets, ways_of(episodes))
            found.append(judged(episodes, score, outputs[None], query.targets[None].cpu()).double())
    return torch.cat(found)


def _as_rows(inputs: Tree) -> np.ndarray:
    """(examples, numbers) of nested inputs."""
    return torch.cat([leaf.cpu().double().flatten(1) for leaf in leaves(inputs)], dim=1).numpy()


def _predicted(fitted: Any, rows: np.ndarray, targets: Tensor, ways: int | None) -> Tensor:
    """Outputs as a network gives them: (examples, ways) probabilities, or numbers of the targets' shape."""
    if ways is None:
        return torch.from_numpy(np.asarray(fitted.predict(rows))).to(targets.dtype).view(targets.shape)
    outputs = torch.zeros(len(rows), ways, dtype=torch.float64)
    outputs[:, torch.from_numpy(fitted.classes_)] = torch.from_numpy(fitted.predict_proba(rows))
    return outputs


class _Slice:
    """Episodes from `start` on."""

    def __init__(self, episodes: TaskSequence, start: int):
        check_sequence(episodes)
        self.episodes, self.start = episodes, start
        self.ways, self.copies = ways_of(episodes), copies_of(episodes)

    def batch(self, start: int, tasks: int) -> Batch:
        return self.episodes.batch(self.start + start, tasks)
