"""A signal as a function of its coordinates, with modulations that are its own."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fomaml.choices import check_choice
from fomaml.errors import InputError, positive

Modulation = Literal["shift", "film"]


class SIREN(nn.Module):
    """A network of sines (Sitzmann et al. 2020): coordinates (examples, inputs), in [-1, 1], to (examples, outputs).

    Each of its layers is sin(ω₀ (W x + b)), and the last one linear. Weights are drawn as in section 3.2 and the
    supplement: the first layer's from U(-1/n, 1/n), the others' from U(-√(6/n)/ω₀, √(6/n)/ω₀), with n inputs each, so
    that what goes into a sine has a standard deviation of 1 at any depth once it is past the first.

    Modulations, which CAVIA adapts for each signal, as `context` (Dupont et al. 2022, section 3.2; Perez et al. 2018):
        "shift": sin(ω₀ (W x + b + s)),  "film": sin(ω₀ ((1 + g) ⊙ (W x + b) + s)),
    of every sine layer, zero at the start of a task. With latent=d, the context has d numbers, and s, or g and s, are a
    linear function of it, `modulate`; else the context is s itself, (layers, hidden), or g and s, (layers, 2, hidden).

    inputs, outputs: numbers of coordinates and values. hidden, layers: width and number of the sine layers.
    omega: ω₀, higher for finer detail.

    Raises:
        InputError: an unknown modulation, a latent size without one; inputs of another shape.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: int = 64,
        layers: int = 3,
        omega: float = 30.0,
        modulation: Modulation | None = None,
        latent: int | None = None,
    ):
        super().__init__()
        self.inputs = positive("inputs", inputs, integer=True)
        self.omega = positive("omega", omega)
        layers = positive("layers", layers, integer=True)
        sizes = [inputs, *[hidden] * (layers - 1)]
        self.body = nn.ModuleList(nn.Linear(size, hidden) for size in sizes)
        self.head = nn.Linear(hidden, outputs)
        for number, layer in enumerate([*self.body, self.head]):
            fan_in = layer.weight.shape[1]
            bound = math.sqrt(6 / fan_in) / omega if number else 1 / fan_in
            nn.init.uniform_(layer.weight, -bound, bound)
        self.modulation = modulation
        self.modulate: nn.Linear | None = None
        if modulation is None:
            if latent is not None:
                raise InputError(
                    "latent is the size of what modulates; give modulation='shift' or 'film' too"
                )
            return
        check_choice("modulation", modulation, Modulation)
        shape = (layers, hidden) if modulation == "shift" else (layers, 2, hidden)
        if latent is not None:
            self.modulate = nn.Linear(positive("latent", latent, integer=True), math.prod(shape))
        self._shape = shape
        self.context = nn.Parameter(torch.zeros(shape if latent is None else latent))

    def forward(self, coordinates: Tensor) -> Tensor:
        if coordinates.dim() != 2 or coordinates.shape[1] != self.inputs:
            raise InputError(
                f"SIREN takes (examples, {self.inputs} coordinates), got {tuple(coordinates.shape)}"
            )
        hidden = coordinates
        for number, layer in enumerate(self.body):
            hidden = torch.sin(self.omega * self._modulated(layer(hidden), number))
        return self.head(hidden)

    def _modulated(self, hidden: Tensor, number: int) -> Tensor:
        if self.modulation is None:
            return hidden
        all_of_them = self.context
        if self.modulate is not None:
            all_of_them = self.modulate(self.context).view(self._shape)
        own = all_of_them[number]
        return hidden + own if self.modulation == "shift" else hidden * (1 + own[0]) + own[1]
