"""What differs from device to device: the random numbers that each of them draws, and the way to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

ALIGNED = 64  # bytes, at a multiple of which a tensor that is sent begins: kernels may round by how it lies


def sent(tensors: Sequence[Tensor], device: torch.device | str | None) -> list[Tensor]:
    """Tensors of the CPU on a device, by one copy of all of them; to a CUDA device from pinned memory, so that nobody
    waits for it. None: where they are.
    """
    device = torch.device("cpu" if device is None else device)
    if device.type == "cpu":
        return list(tensors)
    if device.type == "mps":  # whose tensors are not seen as another dtype
        return [tensor.to(device) for tensor in tensors]
    places, end = [], 0
    for tensor in tensors:
        places.append(slice(end, end + tensor.nbytes))
        end += -(-tensor.nbytes // ALIGNED) * ALIGNED
    pinned = device.type == "cuda"
    packed = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    for tensor, place in zip(tensors, places):
        packed[place].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    there = packed.to(device, non_blocking=pinned)
    return [there[place].view(tensor.dtype).view(tensor.shape) for tensor, place in zip(tensors, places)]


def random_state() -> dict[str, Tensor]:
    """The states of torch's random numbers by device, uint8 on the CPU: of "cpu", and of each GPU in use, as "cuda:0"
    or "mps". It does not wait for a device.
    """
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        found |= {f"cuda:{n}": torch.cuda.get_rng_state(n) for n in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        found["mps"] = torch.mps.get_rng_state()
    return found


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Have the devices draw on from these states; of a device that is not there a state is left alone.

    Raises:
        RuntimeError: what is no state of a device.
    """
    for name, state in states.items():
        kind, _, number = name.partition(":")
        if kind == "cpu":
            torch.set_rng_state(state)
        elif kind == "cuda" and torch.cuda.is_available() and int(number) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(number))
        elif kind == "mps" and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state)


@contextmanager
def forked_random(states: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """After the block all devices draw random numbers as if nothing had been drawn, nor seeded, within it.

    states: to begin with; by default as they are.
    """
    before = random_state()
    try:
        if states is not None:
            set_random_state(states)
        yield
    finally:
        set_random_state(before)
