"""What a run is scored by: a function of its settings, as a metric may be asked for."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from fomaml.app.group_tasks import in_own_unit
from fomaml.app.named import own_of
from fomaml.app.own import Own
from fomaml.app.settings import Better, Settings
from fomaml.app.sources import source_of
from fomaml.errors import InputError
from fomaml.metrics import LOSS, METRICS, Metric, OfModel, metric_for, of_each_task


def metrics_of(settings: Settings) -> list[Metric]:
    """All metrics of a run: the first one gives the headline and selects in validation.

    A function of the user's own is called with (outputs, targets) of each task, or with (forward, examples) where the
    loss is the user's own too.

    Raises:
        InputError: two of one name, or the user's own that has not been named here.
    """
    if settings.metric is None:
        return [in_own_unit(settings, source_of(settings).metric) if settings.loss is None else LOSS]
    found = [_metric(settings, name) for name in settings.metric]
    # of scaled targets a criterion's loss says nothing in their own unit; a loss of one's own is what it is
    as_it_is = settings.loss is not None or source_of(settings).kind == "classification"
    found = [each if as_it_is and each is LOSS else in_own_unit(settings, each) for each in found]
    names = [metric.name for metric in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--metric has two of the name {name!r}: leave one out")
    return found


def headline(settings: Settings) -> Metric:
    """The metric that a run is judged by."""
    return metrics_of(settings)[0]


def _metric(settings: Settings, name: str) -> Metric:
    if f"metric {name}" not in (settings.code or {}):
        return metric_for(F.mse_loss if source_of(settings).kind == "regression" else F.cross_entropy, name)
    return as_metric(own_of(settings, f"metric {name}"), settings.metric_direction, settings.loss is not None)


def as_metric(own: Own, direction: Better | None, of_model: bool) -> Metric:
    """The user's own metric. of_model: whether a function is of (forward, examples), as the loss is."""
    value: Any = own.value
    if isinstance(value, Metric):
        return value
    score: Any = OfModel(value) if of_model else of_each_task(value)
    return Metric(getattr(value, "__name__", own.name), score, 1 if direction == "higher" else -1, "")


def measured(settings: Settings, metric: Metric) -> str:
    """What tables say above the scores of a metric."""
    if settings.metric is None and settings.loss is None:
        return source_of(settings).measured
    return f"{metric.name} in {metric.unit}" if metric.unit else metric.name


def facts_of(metric: Metric) -> dict[str, Any]:
    """What a result says of its metric, so that it can be read without it."""
    return {"metric": metric.name, "direction": metric.direction, "unit": metric.unit}


def metric_in(result: dict) -> Metric:
    """The metric of a result, for its name, direction and unit: it may be one of the user's own, which is not here."""
    if "direction" not in result:  # an older one
        return METRICS[result["metric"]]
    return Metric(result["metric"], LOSS.score, result["direction"], result["unit"])
