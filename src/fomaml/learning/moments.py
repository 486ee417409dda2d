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

    def ended(self, state: Mapping[str, Mapping[str, Tensor]], tasks: int | None) -> dict[str, Tensor]:
        """Where tasks ended, by buffer, (tasks, ...) each. tasks: their number; None for one without that axis."""
        found = {}
        for name in self.names if state else ():
            for field in FIELDS:
                buffer, value = f"{field}/{key(name)}", state[name][field].detach()
                shape = getattr(self, buffer).shape
                found[buffer] = value[None] if tasks is None else value.expand(tasks, *shape)
        return found

    @torch.no_grad()
    def take_over(self, ended: Mapping[str, Tensor]) -> None:
        """Where a task ended becomes where the next ones start; see `ended`, without its axis of tasks."""
        for buffer, value in ended.items():
            getattr(self, buffer).copy_(value)

    def keep(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over where a task ended."""
        for name in self.names:
            for field in FIELDS:
                getattr(self, f"{field}/{key(name)}").copy_(state[name][field])
