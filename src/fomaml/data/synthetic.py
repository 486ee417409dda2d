"""Families of functions to regress on, with known answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Sinusoids:
    """y = A sin(x - p), A and p drawn uniformly per task (Finn et al. 2017, section 5.1).

    amplitude, phase: the intervals of A and of p in radians; inputs: the interval of x.
    """

    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, float(np.pi))
    inputs: tuple[float, float] = (-5.0, 5.0)

    def draw(self, random: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        """One function of the family, from (n,) to (n,)."""
        amplitude, phase = random.uniform(*self.amplitude), random.uniform(*self.phase)
        return lambda x: amplitude * np.sin(x - phase)

    numbers: ClassVar[int] = 2  # random ones that `draw` takes

    def many(self, randoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inputs and outputs (tasks, n, 1) of a function for each row of random numbers (tasks, 2 + n) in [0, 1).

        The same bits as of `draw`, and of inputs drawn after it.
        """
        (amplitude, phase), x = randoms[:, : self.numbers].T[..., None], randoms[:, self.numbers :]
        x = _within(self.inputs, x)
        return x[..., None], (_within(self.amplitude, amplitude) * np.sin(x - _within(self.phase, phase)))[
            ..., None
        ]


def _within(interval: tuple[float, float], randoms: np.ndarray) -> np.ndarray:
    low, high = interval
    return low + (high - low) * randoms
