"""A network of table rows: numbers, and columns of categories."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fomaml.errors import InputError, positive, whole


class TableMLP(nn.Module):
    """An MLP on numbers and on embeddings of categories (Guo and Berkhahn 2016).

    `forward(numbers, categories)`: floating (examples, numbers), and int64 (examples, columns) from 0 to the column's
    number of categories less 1; outputs (examples, outputs). Either is left out where the model has none of it.

    numbers: how many numeric columns. categories: the number of categories of each other column. hidden: the widths of
    the ReLU layers. width: of an embedding; by default half the number of its categories, 32 at most.

    Raises:
        InputError: no columns at all; inputs of another shape or dtype.
    """

    def __init__(
        self,
        numbers: int,
        categories: Sequence[int],
        outputs: int,
        *,
        hidden: Sequence[int] = (64, 64),
        width: int | None = None,
    ):
        super().__init__()
        self.numbers = whole("numbers", numbers, 0)
        counts = [positive("categories", count, integer=True) for count in categories]
        if not self.numbers and not counts:
            raise InputError("a table needs columns: give numbers, or categories")
        sizes = [width or min(32, (count + 1) // 2) for count in counts]
        self.embeddings = nn.ModuleList(nn.Embedding(count, size) for count, size in zip(counts, sizes))
        joined = self.numbers + sum(sizes)
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise((joined, *hidden)):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear((joined, *hidden)[-1], outputs)

    def forward(self, numbers: Tensor | None = None, categories: Tensor | None = None) -> Tensor:
        self._check("numbers", numbers, self.numbers, True)
        self._check("categories", categories, len(self.embeddings), False)
        parts = [] if numbers is None else [numbers]
        if categories is not None:
            parts += [table(categories[:, column]) for column, table in enumerate(self.embeddings)]
        return self.head(self.body(torch.cat(parts, dim=1)))

    def _check(self, name: str, given: Tensor | None, columns: int, floating: bool) -> None:
        if given is None and not columns:
            return
        kind = "floating" if floating else "int64"
        if given is None or given.shape[1:] != (columns,) or given.is_floating_point() != floating:
            what = "none" if given is None else f"{given.dtype} of shape {tuple(given.shape)}"
            raise InputError(f"the {name} of a TableMLP are {kind} (examples, {columns}), got {what}")
