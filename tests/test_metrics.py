"""What a score is, and how it is written."""

import pytest
import torch

from fomaml.metrics import ACCURACY, LOSS, METRICS, metric_for
from fomaml.train import scores

OUTPUTS = torch.tensor([[[2.0, 1.0], [0.0, 3.0]], [[1.0, 0.0], [1.0, 0.0]]])  # (tasks, examples, ways)
LABELS, LOSSES = torch.tensor([[0, 1], [0, 1]]), torch.tensor([0.25, 0.5])


def test_scores_are_those_of_each_task():
    found = ACCURACY.score(OUTPUTS, LABELS, None)
    assert found.tolist() == [1.0, 0.5] and found.dtype == torch.float64
    assert LOSS.score(OUTPUTS, LABELS.float(), LOSSES) is LOSSES


def test_the_metric_where_none_is_asked_for_is_by_the_targets():
    assert metric_for(LABELS) is ACCURACY and metric_for(LABELS.bool()) is ACCURACY
    assert metric_for(LABELS.float()) is LOSS
    for targets, metric in ((LABELS, ACCURACY), (LABELS.float(), LOSS)):
        assert torch.equal(scores(OUTPUTS, targets, LOSSES), metric.score(OUTPUTS, targets, LOSSES))


def test_metrics_by_name_with_their_directions():
    assert {name: (metric.name, metric.direction, metric.unit) for name, metric in METRICS.items()} == {
        "accuracy": ("accuracy", 1, "%"),
        "loss": ("loss", -1, ""),
    }


@pytest.mark.parametrize(
    ("metric", "mean", "interval", "digits", "text"),
    [
        (ACCURACY, 0.8534, 0.0061, None, "85.3 ± 0.6"),
        (ACCURACY, 0.8534, 0.0061, 2, "85.34 ± 0.61"),
        (ACCURACY, -0.012, 0.004, None, "-1.2 ± 0.4"),
        (LOSS, 0.1234, 0.0042, None, "0.123 ± 0.004"),
        (LOSS, 12.0, float("nan"), None, "12.000 ± nan"),
    ],
)
def test_a_mean_and_its_interval_as_text(metric, mean, interval, digits, text):
    assert metric.text(mean, interval, digits) == text
