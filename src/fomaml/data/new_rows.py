"""Rows of a table that training has never seen, read by what is known of its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fomaml.choices import nearest_first
from fomaml.data.keys import Kind, few, key_of
from fomaml.data.table import numbers_of, plain_column, without_missing
from fomaml.errors import InputError


class NewRows(NamedTuple):
    """inputs: float64 (rows, features), or {"numbers", "categories"} as of `GroupSource.from_table`. rows: (rows,) the
    number in the table of each, from 0. targets: labels (rows,), or float64 (rows, targets); None where not asked for.
    """

    inputs: Any
    rows: np.ndarray
    targets: np.ndarray | None


def known_columns(
    frame: Any,
    origin: str,
    features: Sequence[str],
    categories: Mapping[str, Sequence[str]],
    targets: Sequence[str],
    kind: Kind,
    drop_missing: bool = False,
) -> NewRows:
    """The columns of a DataFrame that a run knows; others are passed over.

    categories: of each column of texts those that there are, in the order of their numbers. targets: none, or all.

    Raises:
        InputError: a column that is not there, missing or infinite values, text where numbers are expected, a text
            that training has not had; the message says where.
    """
    used = [*features, *categories, *targets]
    for name in used:
        if name not in frame.columns:
            raise InputError(
                f"{origin} has no column {name!r}; there are: {nearest_first(name, list(frame.columns))}"
            )
    kept, _ = without_missing(frame[used], origin, drop_missing)
    inputs: Any = numbers_of(kept, frame, list(features), origin, "feature")
    if categories:
        codes = np.empty((len(kept), len(categories)), dtype=np.int64)
        for place, (name, known) in enumerate(categories.items()):
            numbers = {text: number for number, text in enumerate(known)}
            for row, value in enumerate(map(key_of, plain_column(kept[name]))):
                if value not in numbers:
                    raise InputError(
                        f"the feature {name!r} of {origin} is {value!r} in row {int(kept.index[row]) + 1}, which no "
                        f"row of the training had; it had {few(list(known))}"
                    )
                codes[row, place] = numbers[value]
        inputs = {"numbers": inputs, "categories": codes}
    found = None
    if targets:
        found = (
            plain_column(kept[targets[0]])
            if kind == "classification"
            else numbers_of(kept, frame, list(targets), origin, "target")
        )
    return NewRows(inputs, kept.index.to_numpy(), found)
