"""Classes and examples out of uniform random numbers: which of them a task has, and in what order."""

from __future__ import annotations

import numpy as np


def first(randoms: np.ndarray, number: int) -> np.ndarray:
    """(tasks, number) places of the smallest of (tasks, …) random numbers, in their order: the first of `argsort`."""
    few = np.argpartition(randoms, number - 1, axis=1)[:, :number]
    values = np.take_along_axis(randoms, few, axis=1)
    order = values.argsort(axis=1)
    found = np.take_along_axis(few, order, axis=1)
    ordered = np.take_along_axis(values, order, axis=1)
    # which of equal numbers comes first is for argsort to say
    equal = (np.diff(ordered, axis=1) == 0).any(axis=1) | ((randoms <= ordered[:, -1:]).sum(axis=1) > number)
    if equal.any():
        found[equal] = randoms[equal].argsort(axis=1)[:, :number]
    return found


def distinct(counts: np.ndarray, randoms: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Distinct random integers below `counts` (…), as many as the last axis of `randoms`, in random order.

    Floyd's algorithm (Bentley and Floyd 1987) gives a uniform subset; `order` shuffles it.
    """
    drawn = randoms.shape[-1]
    chosen = np.full(randoms.shape, -1, dtype=np.int64)
    for position in range(drawn):
        last = counts - drawn + position
        candidate = (randoms[..., position] * (last + 1)).astype(np.int64)
        taken = (chosen[..., :position] == candidate[..., None]).any(axis=-1)
        chosen[..., position] = np.where(taken, last, candidate)
    return np.take_along_axis(chosen, order.argsort(axis=-1), axis=-1)
