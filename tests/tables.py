"""Tables and arrays that tests of grouped rows share: every value tells which row it stands in."""

from __future__ import annotations

import numpy as np


class Counted:
    """An array that is no numpy array and keeps count of the rows read from it."""

    def __init__(self, array: np.ndarray):
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype
        self.read: list[int] = []

    def __getitem__(self, rows):
        found = self._array[rows]
        self.read += np.arange(self.shape[0])[rows].tolist()
        return found


def uneven(groups: int = 6, classes: int = 3, least: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows in random order. "x" is (rows, 2), the row's number and another; "key" text; "label" in all groups `least`
    times or more; "time" without order; "value" floating."""
    random = np.random.default_rng(seed)
    key, label = [], []
    for group in range(groups):
        for number in range(classes):
            own = least + int(random.integers(6))
            key += [f"machine {group}"] * own
            label += [number] * own
    order = random.permutation(len(key))
    rows = len(key)
    return {
        "x": np.stack([np.arange(rows), random.normal(size=rows)], axis=1),
        "key": np.array(key)[order],
        "label": np.array(label)[order],
        "time": random.permutation(rows) / 2,
        "value": random.normal(3.0, 5.0, rows),
    }
