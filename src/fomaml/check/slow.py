"""The slow twin: FOMAML as a plain loop, and central differences for second order. No torch.func."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn

from fomaml.check.trial import Trial, changed_buffers, learned
from fomaml.learning.replica import Replicas
from fomaml.models import BatchNorm, normalising
from fomaml.tasks import Task, count, count_of

DIRECTIONS = 3
# Of a step in a random direction of length 1. At 1e-5 a third of all directions crossed a kink of Conv4's max-pools,
# where φ jumps, at 1e-6 none of 40; at 1e-7 rounding shows in the fourth digit.
EPS = 1e-7


def reference(trial: Trial) -> tuple[dict[str, Tensor], set[str]]:
    """FOMAML's gradient the plainest way, copy, descend, differentiate, and the names that any gradient reached.

    No torch.func and nothing of this library, but that its `BatchNorm` is told the inner step.
    """
    torch.manual_seed(trial.seed)
    totals = {name: torch.zeros_like(p) for name, p in learned(trial.model).items()}
    reached: set[str] = set()
    for task in trial.each():
        model = _descend(trial, trial.copy(), task, reached)
        for name, gradient in _gradients(_query_loss(trial, model, task), model, reached).items():
            totals[name] += gradient / count(trial.tasks)
    return totals, reached


def _descend(trial: Trial, model: nn.Module, task: Task, reached: set[str]) -> nn.Module:
    for step in range(trial.inner_steps):
        with normalising(step=step):
            loss = trial.loss(model, task.support)
        gradients = _gradients(loss, model, reached)
        with torch.no_grad():
            for name, parameter in learned(model).items():
                parameter.sub_(trial.inner_lr * gradients[name])
    return model


def _query_loss(trial: Trial, model: nn.Module, task: Task) -> Tensor:
    first, before = None, None
    if any(isinstance(m, BatchNorm) and m.policy == "support" for m in model.modules()):
        first, before = count_of(task.support), task.support.inputs
    with normalising(first=first, step=trial.inner_steps):
        return trial.loss(model, task.query, before)


def _gradients(loss: Tensor, model: nn.Module, reached: set[str]) -> dict[str, Tensor]:
    own = learned(model)
    found = dict(zip(own, torch.autograd.grad(loss, list(own.values()), allow_unused=True)))
    reached |= {name for name, gradient in found.items() if gradient is not None and gradient.any()}
    return {name: torch.zeros_like(own[name]) if g is None else g for name, g in found.items()}


def second_order(trial: Trial):
    """The judge of second-order gradients by central differences, or one that says why these would mean nothing."""
    if trial.dtype != torch.float64:
        return lambda gradients: ("note", "runs, not compared (finite differences need float64)")
    if changed_buffers(trial):
        return lambda gradients: (
            "note",
            "runs, not compared (forward changes buffers, which has no gradient)",
        )
    directions = []
    for _ in range(DIRECTIONS):
        random = {name: torch.randn_like(p) for name, p in learned(trial.model).items()}
        norm = torch.as_tensor(sum(r.square().sum() for r in random.values())).sqrt()
        directions.append({name: r / norm for name, r in random.items()})
    slopes = _slopes(trial, directions)
    # what second order adds to first order is the measure: it may be small beside the gradient
    scale = max(_apart(slopes, _along(reference(trial)[0], directions)), 1e-3 * _apart(slopes))
    still = trial._replace(inner_steps=0)
    if _apart(_slopes(still, directions), _along(reference(still)[0], directions)) > 0.001 * scale:
        why = "autograd's gradient is not the slope of the loss: something detached, rounded or in float32"
        return lambda gradients: ("note", f"runs, not compared ({why})")

    def judge(gradients: dict[str, Tensor]) -> tuple[str, str]:
        error = _apart(slopes, _along(gradients, directions)) / scale
        if error <= 0.002:
            return "ok", f"equals finite differences to {error:.0e} (the median of {DIRECTIONS} directions)"
        return "wrong", f"what it adds to first order is off by {error:.1g} from finite differences"

    return judge


def _slopes(trial: Trial, directions: list[dict[str, Tensor]]) -> list[float]:
    """Central differences of the query loss after the inner steps, the mean over the tasks."""

    def loss(direction: dict[str, Tensor], step: float) -> float:
        start = trial.copy()
        with torch.no_grad():
            for name, parameter in learned(start).items():
                parameter.add_(direction[name], alpha=step)
        torch.manual_seed(trial.seed)
        total = 0.0
        for task in trial.each():
            model = _descend(trial, Replicas(start).duplicate(), task, set())
            total += _query_loss(trial, model, task).item()
        return total / count(trial.tasks)

    return [(loss(d, EPS) - loss(d, -EPS)) / (2 * EPS) for d in directions]


def _along(gradients: Mapping[str, Tensor], directions: list[dict[str, Tensor]]) -> list[float]:
    return [sum((gradients[n] * d).sum().item() for n, d in direction.items()) for direction in directions]


def _apart(these: list[float], those: list[float] | None = None) -> float:
    return median(abs(a - b) for a, b in zip(these, those or [0.0] * len(these)))


def relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference relative to the largest entry of its tensor, or to 1e-4 of the largest of all: a
    bias before a batch norm has a gradient of rounding errors alone."""
    sizes = {name: tensor.abs().max().item() for name, tensor in expected.items()}
    floor = 1e-4 * max(sizes.values()) or 1.0
    return max((found[n] - t).abs().max().item() / max(sizes[n], floor) for n, t in expected.items())
