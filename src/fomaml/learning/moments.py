"""What an inner Adam carries from one task to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fomaml.learning.rates import key

FIELDS = ("square", "weight")  # of the state of `Adam`


class SecondMoments(nn.Module):
    """The second moments of each parameter, in its shape, and how much of a mean they are, 1 - β₂ᵗ after t steps.

    parameters: those that adapt; none where nothing is carried.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.names = list(parameters)
        for name, parameter in parameters.items():
            self.register_buffer(f"square/{key(name)}", torch.zeros_like(parameter))
            self.register_buffer(f"weight/{key(name)}", parameter.new_zeros(()))

    def state(self, adapted: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Where a task starts: the inner optimiser's state by parameter."""
        carried = {
            name: {field: getattr(self, f"{field}/{key(name)}") for field in FIELDS} for name in self.names
        }
        return {name: carried.get(name, {}) for name in adapted}

    def keep(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over where a task ended."""
        for name in self.names:
            for field in FIELDS:
                getattr(self, f"{field}/{key(name)}").copy_(state[name][field])
