"""What a score is: its name, how it is computed, which direction is better, and how it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor


class Metric(NamedTuple):
    """A score of each task.

    score: (outputs, targets, losses) of query sets → (tasks,). outputs (tasks, examples, ...), targets
        (tasks, examples, ...), losses (tasks,) or None where there is no loss.
    direction: 1 if higher is better, -1 if lower is.
    unit: "%" for a score from 0 to 1 that is written in per cent, or "".
    """

    name: str
    score: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    direction: Literal[1, -1]
    unit: Literal["%", ""]

    @property
    def scale(self) -> int:
        """The factor from a score to what is written in the unit."""
        return 100 if self.unit == "%" else 1

    def text(self, mean: float, interval: float, digits: int | None = None) -> str:
        """A mean and its interval, the unit left out: "85.3 ± 0.6" in per cent, else plain numbers, "0.123 ± 0.004"."""
        digits = (1 if self.unit == "%" else 3) if digits is None else digits
        return f"{self.scale * mean:.{digits}f} ± {self.scale * interval:.{digits}f}"


def accuracy(outputs: Tensor, targets: Tensor, losses: Tensor | None = None) -> Tensor:
    """(tasks,) float64 shares of the examples whose largest output is their label's."""
    return (outputs.argmax(-1) == targets).double().flatten(1).mean(1)


def loss(outputs: Tensor, targets: Tensor, losses: Tensor | None) -> Tensor:
    """(tasks,) the losses as they are."""
    assert losses is not None, "a loss is no function of outputs and targets alone"
    return losses


ACCURACY = Metric("accuracy", accuracy, 1, "%")
LOSS = Metric("loss", loss, -1, "")
METRICS = {metric.name: metric for metric in (ACCURACY, LOSS)}


def metric_for(targets: Tensor) -> Metric:
    """The metric where none is asked for: accuracy where the targets are labels, else the loss."""
    return LOSS if targets.is_floating_point() else ACCURACY
