"""Parts of a support set: mini-batches, and parts whose gradients add up to that of the whole."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.errors import InputError
from fomaml.learning.contracts import Criterion
from fomaml.metrics import ignored_label, with_options
from fomaml.tasks import Examples, first
from fomaml.trees import leaves, mapped


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
    found, options = with_options(criterion)
    if isinstance(found, nn.Module):
        names = ("weight", "ignore_index", "label_smoothing")
        options = {name: getattr(found, name) for name in names if hasattr(found, name)}
        found = F.cross_entropy if isinstance(found, nn.CrossEntropyLoss) else F.nll_loss
    return functools.partial(found, **{**options, "reduction": "sum"})


def is_sum(criterion: Any) -> bool:
    """Whether a cross-entropy is a sum, and no mean."""
    criterion, options = with_options(criterion)
    return options.get("reduction", getattr(criterion, "reduction", "mean")) == "sum"


def counted(criterion: Any, targets: Tensor, stacked: bool) -> Tensor | float:
    """What a cross-entropy divides its sum by: (tasks,) if stacked; 1 where it is the sum.

    targets: labels ([tasks,] examples, ...), or probabilities ([tasks,] examples, classes, ...).
    """
    lead = int(stacked)
    if is_sum(criterion):
        return 1.0
    if targets.is_floating_point():  # torch's mean of probabilities is over examples, whatever the weights
        return float(targets.select(1 + lead, 0)[0].numel() if stacked else targets.select(1, 0).numel())
    ignored, own = ignored_label(criterion), summed(criterion)
    assert ignored is not None and own is not None
    options = own.keywords
    counts = targets.ne(ignored)
    weights = counts.to(torch.float32)  # whole numbers, which it holds as they are; a device may lack float64
    if options.get("weight") is not None:
        weights = options["weight"][targets.masked_fill(~counts, 0)] * counts
    return weights.flatten(lead).sum(-1)


def spread(examples: Examples, number: int = 8) -> Examples:
    """A few examples of one task, from all over the set, as they are in the order of their classes."""
    size = len(first(examples.inputs))
    rows = torch.linspace(0, size - 1, min(number, size)).long()
    return mapped(lambda tensor: tensor[rows.to(tensor.device)], examples)


def check_mean(criterion: Criterion | None, outputs_of: Callable[[Any], Any], few: Examples) -> None:
    """Raise `InputError` where the loss of examples is not the mean of one term for each of them.

    outputs_of: inputs → outputs. few: examples, as different as there are.
    """
    number = len(first(few.inputs))
    if criterion is None or number < 2:
        return
    outputs = outputs_of(few.inputs)
    parts = [slice(0, 1), slice(1, None)], [slice(0, number // 2), slice(number // 2, None)]
    for split in parts:
        apart = [outputs_of(mapped(itemgetter(rows), few.inputs)) for rows in split]
        for own, rows in zip(apart, split):
            if not _agree(leaves(own), [leaf[rows] for leaf in leaves(outputs)]):
                raise InputError(
                    "inner_accumulate takes a support set in parts, and the outputs of an example depend on the others"
                )
    if summed(criterion) is not None:
        return
    # others too: at a head of zeros all outputs are the same
    noise = torch.Generator().manual_seed(0)
    moved = mapped(lambda t: t + 0.1 * (0.1 + t.abs()) * torch.rand(t.shape, generator=noise).to(t), outputs)
    for each, split in itertools.product((outputs, moved), parts):
        found = [
            criterion(mapped(itemgetter(rows), each), mapped(itemgetter(rows), few.targets)) for rows in split
        ]
        share = len(first(few.inputs)[split[0]]) / number
        if not _agree([share * found[0] + (1 - share) * found[1]], [criterion(each, few.targets)]):
            raise InputError(
                "inner_accumulate adds the gradients of parts of the support set, which is exact for a criterion that "
                "is the mean of one term for each example; this one is not"
            )


def _agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in zip(found, expected))
