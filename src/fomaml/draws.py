"""Random numbers of a task, and out of them: which classes and examples it has, and in what order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fomaml.errors import whole


def generator(seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """Random numbers that depend on (seed, index) alone: counter-based Philox (Salmon et al. 2011).

    stream: another number gives others for the same index.
    """
    return np.random.Generator(np.random.Philox(key=checked_seed(seed), counter=[0, 0, stream, index]))


def uniforms(seed: int, start: int, tasks: int, numbers: int) -> np.ndarray:
    """(tasks, numbers) in [0, 1), the first that `generator` gives for the indices start, start + 1 …"""
    found = np.empty((tasks, numbers))
    if not tasks:
        return found
    philox = np.random.Philox(key=checked_seed(seed), counter=[0, 0, 0, start])
    random, state = np.random.Generator(philox), philox.state
    counter = state["state"]["counter"]
    for row in range(tasks):
        counter[3] = start + row
        philox.state = state  # a sixth of the time that another generator takes
        random.random(out=found[row])
    return found


def checked_seed(seed: int) -> int:
    """The seed as Python's int, if it is one that `generator` takes."""
    return whole("seed", seed, below=2**128, range=" from 0 to 2**128 - 1")


class Numbers(NamedTuple):
    """What is drawn of tasks: rows (tasks, ways, examples) of the source; quarters (tasks, ways) of a turn, and maps
    (tasks, ways, examples, copies, 6), in [0, 1), where examples are moved.
    """

    rows: np.ndarray
    quarters: np.ndarray | None
    maps: np.ndarray | None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self if each is not None)

    def part(self, rows: slice) -> Numbers:
        """Those of some of the tasks."""
        quarters, maps = (None if each is None else each[rows] for each in self[1:])
        return Numbers(self.rows[rows], quarters, maps)


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
    # position by position in rows that lie close: less than half of the time
    parts = np.ascontiguousarray(np.moveaxis(randoms, -1, 0)).reshape(drawn, -1)
    least = counts.reshape(-1) - drawn
    chosen = np.empty(parts.shape, dtype=np.int64)
    for position in range(drawn):
        last = least + position
        candidate = (parts[position] * (last + 1)).astype(np.int64)
        taken = (chosen[:position] == candidate).any(axis=0)
        chosen[position] = np.where(taken, last, candidate)
    found = np.ascontiguousarray(chosen.T).reshape(randoms.shape)
    return np.take_along_axis(found, order.argsort(axis=-1), axis=-1)
