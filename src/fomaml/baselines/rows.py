"""Examples as an estimator of scikit-learn sees them: one row of numbers each."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fomaml.tasks import first
from fomaml.trees import Tree, call, leaves

Features = Callable[[Tree], Tensor]
CATEGORIES = (torch.int16, torch.int32, torch.int64)


class Rows(NamedTuple):
    """numbers: (examples, columns) float64. categories: (examples, columns) int64. answers: to fit to, or None."""

    numbers: np.ndarray
    categories: np.ndarray
    answers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def chosen(self, which: np.ndarray) -> Rows:
        """Some of them."""
        assert self.answers is not None
        return Rows(self.numbers[which], self.categories[which], self.answers[which])

    def joined(self, others: Rows) -> Rows:
        """These, then others."""
        assert self.answers is not None and others.answers is not None
        return Rows(
            np.concatenate([self.numbers, others.numbers]),
            np.concatenate([self.categories, others.categories]),
            np.concatenate([self.answers, others.answers]),
        )


def rows_of(inputs: Tree, features: Features | None, answers: np.ndarray | None = None) -> Rows:
    """Nested inputs (examples, ...), or features of them, side by side."""
    if features is not None:
        with torch.no_grad():
            inputs = (
                call(copy.deepcopy(features).eval(), inputs)
                if isinstance(features, nn.Module)
                else features(inputs)
            )
    number = len(first(inputs))
    found: dict[bool, list[np.ndarray]] = {
        False: [np.empty((number, 0))],
        True: [np.empty((number, 0), np.int64)],
    }
    for leaf in leaves(inputs):
        flat = leaf.detach().cpu().reshape(number, -1)
        is_category = leaf.dtype in CATEGORIES
        found[is_category].append(flat.long().numpy() if is_category else flat.double().numpy())
    return Rows(np.concatenate(found[False], axis=1), np.concatenate(found[True], axis=1), answers)


class Encoder:
    """Rows as one array of numbers, categories one-hot; those that were not there to fit to are zeros."""

    def __init__(self, rows: Rows):
        self.one_hot: Any = None
        if rows.categories.shape[1]:
            preprocessing = importlib.import_module("sklearn.preprocessing")
            self.one_hot = preprocessing.OneHotEncoder(handle_unknown="ignore", sparse_output=False)
            self.one_hot.fit(rows.categories)

    def __call__(self, rows: Rows) -> np.ndarray:
        if self.one_hot is None:
            return rows.numbers
        return np.concatenate([rows.numbers, self.one_hot.transform(rows.categories)], axis=1)
