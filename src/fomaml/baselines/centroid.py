"""The class whose mean support input is nearest: a baseline without a network."""

from __future__ import annotations

import math
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.episodes import TaskSequence
from fomaml.errors import InputError, whole
from fomaml.evaluate import judged
from fomaml.measures import exact
from fomaml.metrics import Asked, as_asked, metrics_for
from fomaml.portions import Portions
from fomaml.streams import batch_of
from fomaml.tasks import Task, are_labels, singles
from fomaml.trees import Tree


@overload
def nearest_centroid(
    episodes: TaskSequence, *, tasks: int = 1000, tasks_at_once: int = 100, metric: Asked = "accuracy"
) -> Tensor: ...
@overload
def nearest_centroid(
    episodes: TaskSequence, *, tasks: int = 1000, tasks_at_once: int = 100, metric: list[Asked]
) -> dict[str, Tensor]: ...
def nearest_centroid(
    episodes: TaskSequence,
    *,
    tasks: int = 1000,
    tasks_at_once: int = 100,
    metric: Asked | list[Asked] = "accuracy",
) -> Tensor | dict[str, Tensor]:
    """(tasks,) float64 scores of the class whose mean support input is nearest, in Euclidean distance.

    metric: as in `evaluate`, of outputs that are the distances times -1; there is no loss. Labels of -100 are left out.
        Of a list of metrics the scores of each, by name.

    Raises:
        InputError: targets that are no labels, one for each example.
    """
    metrics = metrics_for(F.cross_entropy, metric)
    tasks, tasks_at_once = whole("tasks", tasks, 1), whole("tasks_at_once", tasks_at_once, 1)

    def score(part: range) -> Tensor:
        """(metrics, tasks)."""
        batch = batch_of(episodes, part.start, len(part), nn.Identity())
        found: list[list[Tensor]] = [[] for _ in metrics]
        for own in [batch] if isinstance(batch, Task) else singles(batch):
            nearness = _nearness(own)
            for each, scored in zip(metrics, found):
                scored.append(exact(judged(episodes, each, nearness, own.query.targets)))
        return torch.stack([torch.cat(scored) for scored in found])

    scored = torch.cat([found for _, found in Portions(tasks_at_once)(range(tasks), score)], dim=1)
    return as_asked(metric, {each.name: own for each, own in zip(metrics, scored)})


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
