"""How far a meta-gradient is from that of the slow reference, and what counts as exact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from runpy import run_path

import torch
from torch import Tensor

from benchmarks.workloads import Setup

FLOAT64 = 1e-8
# A single ReLU or max-pool decision that rounds the other way moves a float32 gradient of a convolutional
# net by per cents; float32 is therefore only looked at for what is plainly wrong.
FLOAT32 = 0.1


def reference(setup: Setup) -> list[Tensor]:
    """The meta-gradient by the obvious loop of tests/reference.py, in the order of the model's parameters."""
    slow = run_path(str(Path(__file__).parent.parent / "tests" / "reference.py"))
    rates = {name: setup.workload.inner_lr for name, _ in setup.model.named_parameters()}

    def one_task(model, task):
        return slow["fomaml"](model, task, setup.criterion, rates, setup.workload.steps)

    return list(slow["over_tasks"](one_task, setup.model, setup.tasks).gradients.values())


def error(found: Sequence[Tensor], expected: Sequence[Tensor], floor: float = 1e-3) -> float:
    """The largest ‖found - expected‖ / ‖expected‖ over the parameters.

    floor: a parameter whose expected norm is less than this share of the whole gradient's is judged by
    that share instead: a bias before a batch norm has no gradient but rounding.

    Raises:
        ValueError: another number of parameters, or other shapes.
    """
    if [g.shape for g in found] != [g.shape for g in expected]:
        raise ValueError(f"gradients of shapes {[tuple(g.shape) for g in found]} do not fit the reference")
    found = [g.detach().double() for g in found]
    expected = [g.detach().double() for g in expected]
    whole = torch.stack([g.norm() for g in expected]).norm()
    parts = [(f - e).norm() / torch.maximum(e.norm(), floor * whole) for f, e in zip(found, expected)]
    return float(torch.stack(parts).max())
