"""The launches of a traced function, recorded once as a CUDA graph and replayed: one launch in the place of hundreds.

A graph reads and writes the memory that it was recorded with. So the tensors of tasks are copied into memory of its
own; parameters and buffers are read where they lie, and it is recorded anew where they lie elsewhere; what it finds is
copied before the next replay writes over it. Clipping and the optimiser stay outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomaml.devices import forked_random

WARMING = 2  # calls before it is recorded, in which libraries make what they keep


class _Recorded(NamedTuple):
    """A graph, where the tensors lie that it reads, and what it reads of tasks and gives."""

    graph: Any
    places: tuple[int, ...]
    given: list[Tensor]
    found: list[Tensor]


class Replayed:
    """A function of plain operators on CUDA, whose launches are replayed.

    function: of a state, so many tensors that mostly stay where they are, and then those of tasks. It waits for nothing
        that the device computes.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], state: int):
        self._function, self._state = function, state
        self._recorded: _Recorded | None = None

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        state, examples = arguments[: self._state], arguments[self._state :]
        places = tuple([tensor.data_ptr() for tensor in state])
        if self._recorded is None or self._recorded.places != places:
            self._recorded = None  # its memory is free before other is taken
            self._recorded = self._record(state, examples, places)
        graph, _, given, found = self._recorded
        for place, tensor in zip(given, examples, strict=True):
            place.copy_(tensor, non_blocking=True)
        graph.replay()
        return [tensor.clone() for tensor in found]

    def _record(
        self, state: Sequence[Tensor], examples: Sequence[Tensor], places: tuple[int, ...]
    ) -> _Recorded:
        given = [tensor.clone() for tensor in examples]
        device = (*state, *examples)[0].device
        present, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        aside.wait_stream(present)
        with torch.cuda.stream(aside), forked_random():
            for _ in range(WARMING):
                self._function(*state, *given)
        present.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=_pool(device)):
            found = [*self._function(*state, *given)]
        return _Recorded(graph, places, given, found)


@functools.cache
def _pool(device: torch.device) -> Any:
    """The memory of all graphs of a device. They are replayed one after the other, and what they find is copied."""
    with torch.cuda.device(device):
        return torch.cuda.graph_pool_handle()
