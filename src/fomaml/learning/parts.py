"""Parts of a support set: mini-batches, and parts whose gradients add up to that of the whole."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.errors import InputError
from fomaml.learning.contracts import Criterion
from fomaml.metrics import ignored_label
from fomaml.tasks import Examples, first
from fomaml.trees import mapped


def minibatch(examples: Examples, size: int | None, step: int, stacked: bool) -> Examples:
    """The mini-batch of inner step `step`: every m-th example from the (step mod m)-th on, m = ⌈n / size⌉."""
    axis = int(stacked)
    number = first(examples.inputs).shape[axis]
    if size is None or size >= number:
        return examples
    batches = -(-number // size)
    rows = (slice(None),) * axis + (slice(step % batches, None, batches),)
    return mapped(lambda tensor: tensor[rows], examples)


def parts_of(examples: Examples, size: int, stacked: bool) -> Iterator[tuple[Examples, float]]:
    """Parts of at most `size` examples, in order, each with its share of all of them."""
    axis = int(stacked)
    number = first(examples.inputs).shape[axis]
    for start in range(0, number, size):
        rows = (slice(None),) * axis + (slice(start, start + size),)
        part = mapped(lambda tensor, rows=rows: tensor[rows], examples)
        yield part, min(size, number - start) / number


def summed(criterion: Criterion | None) -> functools.partial | None:
    """The sum that a cross-entropy is the mean of, as its means are by the labels that it counts; None for others."""
    if ignored_label(criterion) is None:
        return None
    found: Any = criterion
    options: dict[str, Any] = {}
    while isinstance(found, functools.partial):
        options = found.keywords | options
        found = found.func
    if isinstance(found, nn.Module):
        names = ("weight", "ignore_index", "label_smoothing")
        options = {name: getattr(found, name) for name in names if hasattr(found, name)}
        found = F.cross_entropy if isinstance(found, nn.CrossEntropyLoss) else F.nll_loss
    return functools.partial(found, **{**options, "reduction": "sum"})


def counted(criterion: Any, targets: Tensor, stacked: bool) -> Tensor | float:
    """What the mean of a cross-entropy divides by: (tasks,) if stacked.

    targets: labels ([tasks,] examples, ...), or probabilities ([tasks,] examples, classes, ...).
    """
    lead = int(stacked)
    if targets.is_floating_point():  # torch's mean of probabilities is over examples, whatever the weights
        return float(targets.select(1 + lead, 0)[0].numel() if stacked else targets.select(1, 0).numel())
    ignored, own = ignored_label(criterion), summed(criterion)
    assert ignored is not None and own is not None
    options = own.keywords
    counts = targets.ne(ignored)
    weights = counts.double()
    if options.get("weight") is not None:
        weights = options["weight"][targets.masked_fill(~counts, 0)] * counts
    return weights.flatten(lead).sum(-1)


def check_mean(criterion: Criterion | None, outputs: Any, targets: Any) -> None:
    """Raise `InputError` where a criterion is not the mean of one term for each example.

    outputs, targets: of a few examples.
    """
    number = len(first(outputs))
    if criterion is None or summed(criterion) is not None or number < 2:
        return
    with torch.no_grad():
        whole, one, rest = (
            criterion(
                mapped(lambda t, rows=rows: t[rows], outputs), mapped(lambda t, rows=rows: t[rows], targets)
            )
            for rows in (slice(None), slice(1), slice(1, None))
        )
        if torch.allclose(whole, (one + (number - 1) * rest) / number, rtol=1e-4):
            return
    raise InputError(
        "inner_accumulate adds the gradients of parts of the support set, which is exact for a criterion that is the "
        "mean of one term for each example; this one is not"
    )
