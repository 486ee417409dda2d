"""Raw inputs made ready as in training: pictures, rows of a table, arrays and recordings that the run has never seen.

What a run did to its data is kept as plain values: sizes, colours, columns, categories, scaling. An intake is these
values and the way from a stranger's file to what the model takes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fomaml.trees import Tree


class Taken(NamedTuple):
    """Examples as the model takes them.

    inputs: (examples, ...), nested as in training. names: what each is called: a file's path, or the number of a row.
    labels: of each its class as text, or floating (examples, targets) in the targets' own unit; None where there are
        none. tasks: the different tasks of labelled rows, where they say so.
    """

    inputs: Tree
    names: list[str]
    labels: list[str] | Tensor | None = None
    tasks: list[str] | None = None


class Intake(Protocol):
    """inputs: without labels; labelled: with. Both raise `InputError` for what the run does not take."""

    def inputs(self, given: Any) -> Taken: ...

    def labelled(self, given: Any) -> Taken: ...
