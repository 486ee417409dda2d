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

    def ended(self, state: Mapping[str, Mapping[str, Tensor]], tasks: int | None = None) -> dict[str, Tensor]:
        """Where a task ended, by buffer. tasks: the state is of so many, and what is found (tasks, ...)."""
        found = {}
        for name in self.names if state else ():
            for field in FIELDS:
                buffer, value = f"{field}/{key(name)}", state[name][field].detach()
                shape = getattr(self, buffer).shape
                found[buffer] = value if tasks is None else value.expand(tasks, *shape)
        return found

    @torch.no_grad()
    def take_over(self, ended: Mapping[str, Tensor]) -> None:
        """Where a task ended becomes where the next ones start; see `ended`."""
        for buffer, value in ended.items():
            getattr(self, buffer).copy_(value)
