"""So many tasks at once, and half as many where memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from fomaml.engines.common import out_of_memory

Found = TypeVar("Found")


class Portions:
    """What is computed of many tasks in portions of `at_once`, which is halved, with a warning, where memory runs out,
    and stays so.
    """

    def __init__(self, at_once: int):
        self.at_once = at_once

    def __call__(self, tasks: range, compute: Callable[[range], Found]) -> Iterator[tuple[range, Found]]:
        """Portion after portion, with what `compute` gives of it: drawn anew where there was too little memory.

        Raises: whatever `compute` does, where it is no lack of memory, or that of a single task.
        """
        start = tasks.start
        while start < tasks.stop:
            part = range(start, min(start + self.at_once, tasks.stop))
            try:
                found = compute(part)
            except Exception as error:  # whatever a module raises
                if len(part) == 1 or not out_of_memory(error):
                    raise
                self.at_once = (len(part) + 1) // 2
                text = f"out of memory: {self.at_once} tasks at once from now on"
                warnings.warn(text, RuntimeWarning, stacklevel=3)
                continue  # beyond this block nothing of the failed attempt is held
            yield part, found
            start = part.stop
