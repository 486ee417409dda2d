"""Families of functions to regress on, with known answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
