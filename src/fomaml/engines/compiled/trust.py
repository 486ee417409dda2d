"""What was compiled is compared with the eager engine before it is trusted, once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import torch
from torch import Tensor
from torch.random import fork_rng

from fomaml.engines.common import Found, out_of_memory
from fomaml.engines.compiled.trace import Compiled, Find, Holder
from fomaml.learning.adapt import call
from fomaml.learning.learner import MetaLearner
from fomaml.tasks import Task

TOLERANCE = 1e-3
TOLERANCE_OF_FLOAT64 = 1e-6
CHUNKS = 3
SMALL = 0.01


class Wrong(RuntimeError):
    """What was compiled does not compute what the eager engine does."""


def compare(
    learner: MetaLearner, compiled: Compiled, find: Find, tasks: Task, others: Iterable[Task] = ()
) -> str:
    """Compare the compiled function with the eager `find` on a chunk of tasks; returns why that could not be, or "".

    Losses and outputs are to agree to `TOLERANCE`, gradients too, relative to their norms; or to four times the eager
    engine's own error against float64, where that is more. One ReLU that rounds the other way moves a gradient by per
    cents, so a miss is repeated on two other chunks: of `others`, or these tasks with their inputs moved a little.
    Random numbers are drawn the same in both; the state that draws them stays as it was, and so does the learner's.

    Raises:
        Wrong: three misses.
    """
    device = tasks.support.inputs.device
    devices = [device] if device.type == "cuda" else []
    for chunk in islice(chain([tasks], others, _moved(tasks)), CHUNKS):
        with fork_rng(devices=devices):
            [found] = compiled.map([chunk])
        try:
            with fork_rng(devices=devices), torch.enable_grad():
                expected = find(chunk)
        except Exception as error:  # whatever a module raises
            if out_of_memory(error):
                return "that takes more memory than there is"
            raise
        apart = _apart(found, expected)
        if _within(apart, learner, find, chunk, expected, devices):
            return ""
        if compiled.draws_its_own:
            return "its random numbers are others"
    losses, gradients = apart
    raise Wrong(
        f"what was compiled is off the eager engine by {losses:.2g} of its losses and {gradients:.2g} of its gradients"
    )


def _within(apart, learner, find, chunk, expected, devices) -> bool:
    """Whether the differences, of losses and of gradients, are as small as those of rounding."""
    if all(tensor.dtype == torch.float64 for tensor in _floating(learner.state_dict().values())):
        return max(apart) <= TOLERANCE_OF_FLOAT64
    if max(apart) <= TOLERANCE:
        return True
    with fork_rng(devices=devices), torch.enable_grad():
        exact = _exact(learner, find, chunk)
    if exact is None:
        return False
    return all(one <= max(TOLERANCE, 4 * own) for one, own in zip(apart, _apart(expected, exact)))


def _exact(learner: MetaLearner, find: Find, chunk: Task) -> Found | None:
    """What the eager engine finds in float64; None where the model does not run in it."""
    holder = Holder(learner)
    tensors = dict(holder.named_parameters()) | dict(holder.named_buffers())
    state = {
        name: (tensor.detach().double() if tensor.is_floating_point() else tensor.detach()).requires_grad_(
            tensor.requires_grad
        )
        for name, tensor in tensors.items()
    }
    try:
        return call(holder, state, (chunk.to(dtype=torch.float64), find))
    except Exception:  # whatever a module raises
        return None


def _apart(found: Found, expected: Found) -> tuple[float, float]:
    """How far losses and outputs, and gradients, are from the expected ones, relative to the norm of each tensor.

    A gradient that is small beside the others, as that of a bias before a batch norm, which is nothing but rounding,
    is measured by `SMALL` of the norm of all.
    """
    gradients = [_norm([tensor]) for tensor in expected.gradients]
    least = SMALL * _norm(expected.gradients)
    return (
        max(_off(one, other, _norm([other])) for one, other in zip(found[1:], expected[1:])),
        max(
            _off(one, other, max(size, least))
            for one, other, size in zip(found.gradients, expected.gradients, gradients)
        ),
    )


def _off(found: Tensor, expected: Tensor, size: float) -> float:
    difference = _norm([_exactly(found) - _exactly(expected)])
    if difference == 0:
        return 0.0
    off = difference / size if size else math.inf
    return math.inf if math.isnan(off) else off  # where the comparison would hide it


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(_exactly(tensor).abs().square().sum().item() for tensor in tensors))


def _exactly(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64))


def _moved(tasks: Task) -> Iterator[Task]:
    """The tasks with a little noise on their inputs; where these are whole numbers, dealt to other examples."""
    for seed in range(1, CHUNKS):
        draw = torch.Generator().manual_seed(seed)

        def move(inputs: Tensor, draw=draw, seed=seed) -> Tensor:
            if not inputs.is_floating_point():
                return inputs.roll(seed, 1)
            noise = torch.randn(inputs.shape, generator=draw).to(inputs)
            return inputs + 0.01 * inputs.abs().mean() * noise

        yield Task(*(part._replace(inputs=move(part.inputs)) for part in tasks))


def _floating(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors if tensor.is_floating_point())
