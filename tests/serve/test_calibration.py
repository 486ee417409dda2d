"""Temperatures and calibration errors, against plain loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fomaml.errors import InputError
from fomaml.serve.calibration import calibrated, calibration_error, fit_temperature, reliability


def drawn(seed, examples=400, classes=4):
    """Logits whose softmax is the truth: labels are drawn from it."""
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(size=(examples, classes)) * 2)
    labels = [random.choice(classes, p=row) for row in logits.softmax(1).numpy()]
    return logits, torch.tensor(labels)


def test_the_temperature_has_the_least_loss():
    logits, labels = drawn(0)
    found = fit_temperature(logits * 3, labels)
    grid = torch.exp(torch.linspace(-5, 5, 20001, dtype=torch.float64))
    losses = [F.cross_entropy(logits * 3 / each, labels).item() for each in grid[::20]]
    assert found == pytest.approx(grid[::20][int(np.argmin(losses))].item(), rel=0.01)
    assert found == pytest.approx(3 * fit_temperature(logits, labels), rel=1e-3)


def test_the_error_is_that_of_a_plain_loop():
    logits, labels = drawn(1)
    probabilities = (logits * 2).softmax(1)
    confidence, guess = probabilities.max(1)
    expected = 0.0
    for low in range(15):
        inside = [i for i, own in enumerate(confidence.tolist()) if low / 15 < own <= (low + 1) / 15]
        if inside:
            accuracy = sum(int(guess[i] == labels[i]) for i in inside) / len(inside)
            expected += (
                len(inside) / len(labels) * abs(accuracy - sum(confidence[inside].tolist()) / len(inside))
            )
    assert calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-12)
    assert calibration_error(torch.eye(3)[[0, 1, 2]], torch.tensor([0, 1, 2])) == 0


def test_fitting_and_judging_take_different_tasks():
    tasks = [drawn(seed, 200) for seed in range(6)]
    found = calibrated([5 * logits for logits, _ in tasks], [labels for _, labels in tasks])
    assert found.temperature == pytest.approx(5, rel=0.15)
    assert found.error < found.error_before / 2
    others = (
        torch.cat([5 * logits for logits, _ in tasks[1::2]]),
        torch.cat([labels for _, labels in tasks[1::2]]),
    )
    assert found.error_before == pytest.approx(calibration_error(others[0].softmax(1), others[1]))
    assert (found.tasks, found.examples) == (6, 1200)


@pytest.mark.parametrize("logits", [torch.zeros(0, 3), torch.tensor([[0.0, float("nan")]])])
def test_what_cannot_be_fitted_is_refused(logits):
    with pytest.raises(InputError, match="finite logits"):
        fit_temperature(logits, torch.zeros(len(logits), dtype=torch.long))
    with pytest.raises(InputError, match="two tasks"):
        calibrated([logits], [torch.zeros(0, dtype=torch.long)])


def test_reliability_counts_each_bin():
    # confidences of 0.6, 0.7, 0.9 and 1.0 in bins of a half: all in the second one
    probabilities = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.9, 0.1], [0.0, 1.0]])
    found = reliability(probabilities, torch.tensor([0, 0, 0, 1]), bins=2)
    assert found.examples.tolist() == [0, 4]
    assert found.confidence.tolist() == pytest.approx([0, 0.8])
    assert found.accuracy.tolist() == [0, 0.75]
    assert found.error == pytest.approx(0.05)
    # in bins of an eighth each stands alone, and 0.9 and 1.0 together
    found = reliability(probabilities, torch.tensor([0, 0, 0, 1]), bins=8)
    assert found.examples.tolist() == [0, 0, 0, 0, 1, 1, 0, 2]
    assert found.error == pytest.approx((0.4 + 0.7 + 2 * 0.05) / 4)
