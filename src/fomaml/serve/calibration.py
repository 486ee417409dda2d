"""Probabilities that mean something: a temperature for the logits, and how far confidence is from accuracy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fomaml.errors import InputError
from fomaml.measures import exact

BINS = 15
RANGE = (-5.0, 5.0)  # of the logarithm of a temperature
ACCURATE = 1e-4  # of the same


class Calibration(NamedTuple):
    """The temperature that logits are divided by, and what it does.

    error, error_before: the expected calibration error with it and without, from 0 to 1.
    tasks, examples: that it was fitted on half of, and the errors measured on the other half.
    """

    temperature: float
    error: float
    error_before: float
    tasks: int
    examples: int


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T at which softmax(logits / T) has the least mean cross-entropy (Guo et al. 2017, section 4.2).

    logits: (examples, classes); labels: (examples,) int64. The loss is convex in 1/T; the search is by golden section
    over log T from -5 to 5.

    Raises:
        InputError: no examples, or logits that are not finite.
    """
    if not len(labels) or not logits.isfinite().all():
        raise InputError("a temperature is fitted on finite logits of one example or more")
    logits, labels = exact(logits), labels.cpu()

    def loss(log: float) -> float:
        return F.cross_entropy(logits / math.exp(log), labels).item()

    ratio = (math.sqrt(5) - 1) / 2
    low, high = RANGE
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    of_left, of_right = loss(left), loss(right)
    while high - low > ACCURATE:
        if of_left <= of_right:
            high, right, of_right = right, left, of_left
            left = high - ratio * (high - low)
            of_left = loss(left)
        else:
            low, left, of_left = left, right, of_right
            right = low + ratio * (high - low)
            of_right = loss(right)
    return math.exp((low + high) / 2)


class Reliability(NamedTuple):
    """Of each bin of confidence: the examples (bins,) int64, their mean confidence and accuracy (bins,) float64, 0
    where there are none.
    """

    examples: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error, see `calibration_error`."""
        apart = (self.confidence - self.accuracy).abs() * self.examples
        return (apart.sum() / self.examples.sum()).item()


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """How often predictions of each confidence are right, over equal bins of confidence (Guo et al. 2017, figure 1).

    probabilities: (examples, classes); labels: (examples,).
    """
    confidence, guess = exact(probabilities).max(1)
    right = exact(guess == labels.cpu())
    # bins are closed above: (0, 1/15], …
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    examples = torch.bincount(number, minlength=bins)
    means = [
        torch.zeros(bins, dtype=torch.float64).index_add(0, number, values) / examples.clamp(min=1)
        for values in (confidence, right)
    ]
    return Reliability(examples, *means)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """The expected calibration error: the mean distance of confidence from accuracy over equal bins of confidence,
    weighted by their examples (Naeini et al. 2015; Guo et al. 2017, equation 3).

    probabilities: (examples, classes); labels: (examples,).
    """
    return reliability(probabilities, labels, bins).error


def calibrated(logits: list[Tensor], labels: list[Tensor]) -> Calibration:
    """The calibration by tasks: fitted on every other one, its errors measured on those between.

    logits: of each task (examples, classes); labels: of each task (examples,). Two tasks or more.
    """
    if len(logits) < 2:
        raise InputError(f"calibration needs two tasks or more, got {len(logits)}")
    temperature = fit_temperature(torch.cat(logits[::2]), torch.cat(labels[::2]))
    others, truth = torch.cat(logits[1::2]).double(), torch.cat(labels[1::2])
    return Calibration(
        temperature,
        calibration_error((others / temperature).softmax(1), truth),
        calibration_error(others.softmax(1), truth),
        len(logits),
        sum(map(len, labels)),
    )
