"""What a score is, which one is taken, and how it is written."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomaml.errors import InputError
from fomaml.metrics import ACCURACY, LOSS, Metric, ignored_label, metric_for, of_each_task, scores

OUTPUTS = torch.tensor([[[2.0, 1.0], [0.0, 3.0]], [[1.0, 0.0], [1.0, 0.0]]])  # (tasks, examples, ways)
LABELS, LOSSES = torch.tensor([[0, 1], [0, 1]]), torch.tensor([0.25, 0.5])
PROBABILITIES = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.4, 0.6]]])
INF = math.inf
# (tasks, examples, classes, width): the largest class is 0 1 of the first example, 1 1 of the second
MAPS = torch.tensor([[[[3.0, 0.0], [1.0, 2.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 2.0], [0.5, 0.0]]]])

# --- scores ---------------------------------------------------------------------------------------


def first_output(outputs, targets):
    return outputs[0, 0]


def no_number(outputs, targets):
    return outputs.argmax(-1) == targets


def width(outputs, targets):
    return outputs.shape[1]


# (criterion, metric, outputs, targets, the scores)
SCORES = {
    "labels": (F.cross_entropy, None, OUTPUTS, LABELS, [1, 0.5]),
    "bytes": (F.cross_entropy, None, OUTPUTS, LABELS.byte(), [1, 0.5]),
    "ignored": (F.cross_entropy, None, OUTPUTS, torch.tensor([[0, -100], [-100, 1]]), [1, 0]),
    "ignored by a module": (
        nn.CrossEntropyLoss(ignore_index=1), None, OUTPUTS, torch.tensor([[1, 0], [0, 1]]), [0, 1],
    ),
    "ignored bytes": (
        partial(F.nll_loss, ignore_index=255), "accuracy", OUTPUTS, torch.tensor([[0, 255], [255, 1]]).byte(), [1, 0],
    ),
    "the class axis": (F.cross_entropy, None, MAPS, torch.tensor([[[0, 1], [1, 0]]]), [0.75]),
    "the class axis, ignored": (F.cross_entropy, None, MAPS, torch.tensor([[[0, -100], [1, 0]]]), [2 / 3]),
    "probabilities": (F.cross_entropy, None, OUTPUTS, PROBABILITIES, [1, 0.5]),
    "one-hot targets of another criterion": (
        F.mse_loss, "accuracy", OUTPUTS, F.one_hot(LABELS).float(), [1, 0.5],
    ),
    "labels of another criterion": (F.multi_margin_loss, "accuracy", OUTPUTS, LABELS, [1, 0.5]),
    "classes that a task lacks": (
        F.cross_entropy, None, torch.tensor([[[0.0, 0, -INF]], [[-2.0, -3, -1]]]), torch.tensor([[0], [2]]), [1, 1],
    ),
    "the loss by default": (F.mse_loss, None, OUTPUTS, OUTPUTS, [0.25, 0.5]),
    "the loss of labels": (F.multi_margin_loss, None, OUTPUTS, LABELS, [0.25, 0.5]),
    "the loss by name": (F.cross_entropy, "loss", OUTPUTS, LABELS, [0.25, 0.5]),
    "the loss of what is not known": (lambda o, t: F.cross_entropy(o, t), None, OUTPUTS, LABELS, [0.25, 0.5]),
    "a function": (F.cross_entropy, first_output, OUTPUTS, LABELS, [2, 1]),
    "a function of a number": (F.mse_loss, lambda o, t: float(t[1]), OUTPUTS, LABELS, [1, 1]),
    "a function of a truth": (F.mse_loss, lambda o, t: bool(t[1]), OUTPUTS, LABELS, [1, 1]),
    "a function of numpy's": (F.mse_loss, lambda o, t: np.float32(t.sum()), OUTPUTS, LABELS, [1, 1]),
    "a module": (F.cross_entropy, nn.CrossEntropyLoss(reduction="sum"), torch.zeros(2, 2, 1), LABELS * 0, [0, 0]),
    "a function sees a task's own classes": (
        F.cross_entropy, width, torch.tensor([[[0.0, 0, -INF, -INF]], [[1.0, -INF, 1, 1]]]), LABELS[:, :1], [2, 4],
    ),
    "a function sees masks of the model's own": (
        F.cross_entropy, width, torch.tensor([[[0.0, 0, -INF]], [[1.0, 1, -INF]]]), LABELS[:, :1], [3, 3],
    ),
    "a metric": (F.cross_entropy, Metric("own", lambda o, t, losses: 2 * losses, -1, ""), OUTPUTS, LABELS, [0.5, 1]),
    "a metric out of a function": (
        F.cross_entropy, Metric("first", of_each_task(first_output), -1, ""), OUTPUTS, LABELS, [2, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("criterion", "metric", "outputs", "targets", "expected"), SCORES.values(), ids=SCORES
)
def test_scores(criterion, metric, outputs, targets, expected):
    found = scores(metric_for(criterion, metric), outputs, targets, LOSSES[: len(outputs)])
    assert found.tolist() == pytest.approx(expected)


REFUSED = {
    "an unknown name": (F.mse_loss, "acc", OUTPUTS, LABELS, "unknown metric 'acc'; there are: accuracy, loss"),
    "no metric": (F.mse_loss, 3, OUTPUTS, LABELS, "a metric is a name, a Metric or a function of outputs and targets"),
    "a direction": (
        F.mse_loss, Metric("own", LOSS.score, 0, ""), OUTPUTS, LABELS, "the metric 'own' needs direction 1 or -1",
    ),
    "a metric of one task": (
        F.mse_loss, Metric("own", first_output, 1, ""), OUTPUTS, LABELS,
        r"the score of the metric 'own' takes \(outputs, targets, losses\) of all tasks: fomaml.metrics.of_each_task",
    ),
    "a metric of a loss": (
        F.mse_loss, Metric("mae", F.l1_loss, -1, ""), OUTPUTS, OUTPUTS,
        r"the score of the metric 'mae' takes \(outputs, targets, losses\) of all tasks",
    ),
    "a metric of no function": (
        F.mse_loss, Metric("own", 0.5, -1, ""), OUTPUTS, OUTPUTS, "the score of the metric 'own' takes",
    ),
    "one score for all": (
        F.mse_loss, Metric("own", lambda o, t, losses: losses.mean(), 1, ""), OUTPUTS, LABELS,
        r"the score of the metric 'own' is a tensor of shape \(\), expected 2 scores, one for each task",
    ),
    "a score for each example": (
        F.mse_loss, no_number, OUTPUTS, LABELS,
        r"the metric 'no_number' returns a tensor of shape \(2,\), expected one number for each task",
    ),
    "a function of nothing": (
        F.mse_loss, lambda o, t: None, OUTPUTS, LABELS, "the metric '<lambda>' returns a NoneType",
    ),
    "all ignored": (
        F.cross_entropy, None, OUTPUTS, torch.tensor([[0, 1], [-100, -100]]),
        "all query labels of a task are -100, which is ignored: a task needs others as well",
    ),
    "accuracy of numbers": (
        F.mse_loss, "accuracy", OUTPUTS, OUTPUTS[..., :1], "accuracy needs labels, or probabilities that sum to 1",
    ),
    "accuracy of several labels": (
        F.binary_cross_entropy_with_logits, "accuracy", OUTPUTS, LABELS[..., None].expand(2, 2, 2),
        r"accuracy needs outputs \(examples, classes, ...\) and labels .* got outputs \(2, 2\) and torch.int64 targets",
    ),
    "accuracy of floating labels": (
        F.mse_loss, "accuracy", OUTPUTS, LABELS.float(), r"accuracy needs .* and torch.float32 targets \(2,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("criterion", "metric", "outputs", "targets", "message"), REFUSED.values(), ids=REFUSED
)
def test_what_is_no_score(criterion, metric, outputs, targets, message):
    with pytest.raises(InputError, match=f"^{message}"):
        scores(metric_for(criterion, metric), outputs, targets, LOSSES)


def test_a_loss_is_none_of_outputs_alone():
    with pytest.raises(InputError, match=r"^there is no loss here to score by"):
        scores(LOSS, OUTPUTS, LABELS, None)


def test_a_function_is_called_without_gradients_for_each_task():
    seen = []

    def own(outputs, targets):
        seen.append((outputs.shape, targets.shape, torch.is_grad_enabled()))
        return 1

    found = scores(metric_for(F.mse_loss, own), OUTPUTS.clone().requires_grad_(), LABELS, None)
    assert found.dtype == torch.float64 and seen == [((2, 2), (2,), False)] * 2


# --- which one ------------------------------------------------------------------------------------


class Smoothed(nn.CrossEntropyLoss):
    """The library's own cross-entropy with another default."""

    def __init__(self):
        super().__init__(label_smoothing=0.1, ignore_index=7)


class OverTokens(nn.CrossEntropyLoss):
    """With classes along another axis."""

    def forward(self, outputs, targets):
        return super().forward(outputs.mT, targets)


# (criterion, the label that it ignores; None where it is no cross-entropy that is known)
CRITERIA = [
    (F.cross_entropy, -100),
    (F.nll_loss, -100),
    (nn.CrossEntropyLoss(), -100),
    (nn.CrossEntropyLoss(ignore_index=255), 255),
    (nn.NLLLoss(ignore_index=0), 0),
    (partial(F.cross_entropy, label_smoothing=0.1), -100),
    (partial(partial(F.nll_loss, ignore_index=3), reduction="sum"), 3),
    (partial(nn.CrossEntropyLoss(ignore_index=4)), 4),
    (Smoothed(), 7),
    (OverTokens(), None),
    (lambda outputs, targets: F.cross_entropy(outputs, targets), None),
    (F.mse_loss, None),
    (nn.PoissonNLLLoss(), None),
    (F.binary_cross_entropy_with_logits, None),
    (nn.BCEWithLogitsLoss(), None),
    (F.multi_margin_loss, None),
]


@pytest.mark.parametrize(("criterion", "ignored"), CRITERIA)
def test_the_default_is_the_accuracy_of_a_cross_entropy_else_the_loss(criterion, ignored):
    assert ignored_label(criterion) == ignored
    metric = metric_for(criterion)
    expected = ("loss", -1, "") if ignored is None else ("accuracy", 1, "%")
    assert (metric.name, metric.direction, metric.unit) == expected


def test_a_function_has_its_name_and_more_of_it_is_better():
    for given, name in (
        (first_output, "first_output"),
        (partial(first_output), "first_output"),
        (nn.L1Loss(), "L1Loss"),
    ):
        metric = metric_for(F.mse_loss, given)
        assert (metric.name, metric.direction, metric.unit) == (name, 1, "")


@pytest.mark.parametrize(
    ("metric", "mean", "interval", "digits", "text"),
    [
        (ACCURACY, 0.8534, 0.0061, None, "85.3 ± 0.6"),
        (ACCURACY, 0.8534, 0.0061, 2, "85.34 ± 0.61"),
        (ACCURACY, -0.012, 0.004, None, "-1.2 ± 0.4"),
        (LOSS, 0.1234, 0.0042, None, "0.123 ± 0.004"),
        (LOSS, 12.0, float("nan"), None, "12.000"),
    ],
)
def test_a_mean_and_its_interval_as_text(metric, mean, interval, digits, text):
    assert metric.text(mean, interval, digits) == text
