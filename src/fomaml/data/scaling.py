"""Means and deviations of features and targets, fitted on training tasks alone and applied when rows are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomaml.data.rows import each
from fomaml.errors import InputError
from fomaml.measures import exact
from fomaml.metrics import LOSS, Metric, OfModel


class Standard(NamedTuple):
    """The mean and standard deviation of each column or channel; by a deviation of 0 nothing is divided."""

    mean: list[float]
    deviation: list[float]

    def scaled(self, values: Tensor, axis: int = 1) -> Tensor:
        mean, deviation = self._along(values, axis)
        return (values - mean) / deviation

    def unscaled(self, values: Tensor, axis: int = 1) -> Tensor:
        mean, deviation = self._along(values, axis)
        return values * deviation + mean

    def _along(self, values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Both as tensors that go with `values`, whose axis `axis` runs over the columns, if there is one."""
        deviation = [own or 1.0 for own in self.deviation]
        if values.dim() <= axis:
            return values.new_tensor(self.mean[0]), values.new_tensor(deviation[0])
        if values.shape[axis] != len(self.mean):
            raise InputError(
                f"the scaling is of {len(self.mean)} columns, got {values.shape[axis]}, in shape {tuple(values.shape)}"
            )
        shape = [-1] + [1] * (values.dim() - axis - 1)
        return values.new_tensor(self.mean).view(shape), values.new_tensor(deviation).view(shape)


@dataclass(frozen=True)
class Scaling:
    """(x - mean) / deviation of inputs and targets; columns are axis 1 of an array, its other axes more rows.

    inputs, targets: by the place of an array in its nesting, "" for one that is alone, as "['numbers']".

    Scores in the targets' own unit: `in_own_unit`, or a metric of `unscaled` outputs and targets.
    """

    inputs: Mapping[str, Standard] = field(default_factory=dict)
    targets: Mapping[str, Standard] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            part: {place: own._asdict() for place, own in getattr(self, part).items()}
            for part in ("inputs", "targets")
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Scaling:
        """What `to_dict` has given."""
        try:
            parts = {
                part: {place: Standard(**own) for place, own in given[part].items()}
                for part in ("inputs", "targets")
            }
        except (TypeError, KeyError, AttributeError):
            raise InputError("expected what Scaling.to_dict gives") from None
        return cls(**parts)

    def scaled(self, inputs: Any) -> Any:
        """Inputs, nested tensors (rows, ...), as the model takes them."""

        return each(inputs, scaled_by(self.inputs))

    def unscaled(self, targets: Any, axis: int = 1) -> Any:
        """Targets, or outputs that stand for them, in their own unit. axis: that of the targets' columns, 2 in a stack
        of tasks.
        """

        def leaf(values: Tensor, place: str) -> Tensor:
            return self.targets[place].unscaled(values, axis) if place in self.targets else values

        return each(targets, leaf)

    def in_own_unit(self, metric: Metric) -> Metric:
        """The metric, of outputs and targets (tasks, examples, targets) in the targets' own unit. One that judges the
        model itself stays as it is.

        Raises:
            InputError: the metric is the loss, which is computed of what the model sees.
        """
        if metric.score is LOSS.score:
            raise InputError("the loss is computed of scaled targets: take a metric of outputs and targets")

        def score(outputs: Tensor, targets: Tensor, losses: Tensor | None) -> Tensor:
            return metric.score(self.unscaled(outputs, 2), self.unscaled(targets, 2), losses)

        judges_model = isinstance(metric.score, OfModel)
        return metric._replace(score=score) if self.targets and not judges_model else metric


def scaled_by(known: Mapping[str, Standard]) -> Callable[[Tensor, str], Tensor]:
    """(tensor, place) → the tensor scaled, where there is a scaling of this place."""
    return lambda values, place: known[place].scaled(values) if place in known else values


def fitted(parts: Iterable[Any]) -> dict[str, Standard]:
    """The mean and deviation, by place, of all floating numbers of nested tensors (rows, ...), a part at a time.

    Parts are joined as Chan, Golub and LeVeque (1979) do, in float64.
    """
    known: dict[str, tuple[int, Tensor, Tensor]] = {}

    def leaf(values: Tensor, place: str) -> None:
        if not values.is_floating_point() or not values.numel():
            return
        columns = exact(values[:, None] if values.dim() == 1 else values).movedim(1, -1).flatten(0, -2)
        number, mean = len(columns), columns.mean(0)
        squares = (columns - mean).square().sum(0)
        if place in known:
            before, other, own = known[place]
            step, total = mean - other, before + number
            mean = other + step * number / total
            squares = own + squares + step.square() * before * number / total
            number = total
        known[place] = number, mean, squares

    for part in parts:
        each(part, leaf)
    return {place: _standard(*own) for place, own in known.items()}


def _standard(number: int, mean: Tensor, squares: Tensor) -> Standard:
    deviation = (squares / number).sqrt()
    constant = deviation <= 1e-12 * mean.abs()  # equal numbers, whose mean is off by rounding
    return Standard(mean.tolist(), torch.where(constant, 0.0, deviation).tolist())
