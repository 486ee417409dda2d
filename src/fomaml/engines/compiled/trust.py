"""What was compiled is compared with the eager engine before it is trusted, once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from fomaml.devices import forked_random, random_state
from fomaml.engines.common import Curve, Found, Reached, out_of_memory
from fomaml.engines.compiled.trace import Compiled, Find, Holder
from fomaml.learning.learner import MetaLearner
from fomaml.tasks import Task, device_of
from fomaml.trees import leaves, mapped

TOLERANCE = 1e-3
TOLERANCE_OF_FLOAT64 = 1e-6
CHUNKS = 3
DISTINCT = 7
Results = Found | Curve | Reached
SMALL = 0.01


class Wrong(RuntimeError):
    """What was compiled does not compute what the eager engine does."""


def compare(
    learner: MetaLearner, compiled: Compiled, find: Find, tasks: Task, others: Iterable[Task] = ()
) -> str:
    """Compare the compiled function with the eager `find` on a chunk of tasks; returns why that could not be, or "".

    Losses and outputs are to agree to `TOLERANCE`, gradients too, relative to their norms; or to twice the eager
    engine's own error, where that is more: see `_rounds_so`. One ReLU that rounds the other way moves a gradient by per
    cents. So few examples of a chunk are distinct, see `_repeated`, and a miss is repeated on two other chunks: of
    `others`, or these tasks with their inputs moved a little. Measured on workloads C and E, 8 and 16 seeds: none and a
    quarter of the first chunks, of one task each, are off by more than `TOLERANCE`; of all examples 37 and 60 %.
    Random numbers are drawn the same in both; the state that draws them stays as it was, and so does the learner's.

    Raises:
        Wrong: three misses.
    """

    def of(chunk: Task) -> Results:
        [found] = [*compiled.map([chunk])]
        return found

    if compiled.calls_before:  # with other inputs: what is replayed may know those that it was recorded with
        other = next(_moved(tasks, by=1.0))
        for _ in range(compiled.calls_before):
            _run(lambda: [*compiled.map([other])])
    missed: list[tuple] = []
    for chunk in islice(map(_repeated, chain([tasks], others, _moved(tasks))), CHUNKS):
        found, drawn = _run(partial(of, chunk))
        try:
            expected, drawn_eagerly = _run(partial(find, chunk))
        except Exception as error:  # whatever a module raises
            if out_of_memory(error):
                return "that takes more memory than there is"
            raise
        apart = _apart(learner, found, expected)
        if max(apart) <= _least(learner):
            return ""
        if compiled.draws_its_own and not _same(drawn, drawn_eagerly):
            return "its random numbers are others"
        missed.append((apart, chunk, expected, drawn_eagerly))
    if any(_rounds_so(learner, find, of, *each) for each in missed):
        return ""
    losses, gradients = apart
    raise Wrong(
        f"what was compiled is off the eager engine by {losses:.2g} of its losses and {gradients:.2g} of its gradients"
    )


def _run(function: Callable) -> tuple[Any, dict[str, Tensor]]:
    """What a function finds, and the states of the random numbers after it, which are then as they were before."""
    with forked_random(), torch.enable_grad():
        return function(), random_state()


def _same(states: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return states.keys() == others.keys() and all(torch.equal(states[name], others[name]) for name in states)


def _least(learner: MetaLearner) -> float:
    """How far what was compiled may be off in any case."""
    exactly = all(t.dtype == torch.float64 for t in learner.state_dict().values() if t.is_floating_point())
    return TOLERANCE_OF_FLOAT64 if exactly else TOLERANCE


def _rounds_so(
    learner: MetaLearner,
    find: Find,
    compiled: Callable[[Task], Results],
    apart: tuple[float, float],
    chunk: Task,
    expected: Results,
    drawn: dict[str, Tensor],
) -> bool:
    """Whether the eager engine is as far off itself, by half at least, where the last bits of the inputs are others or
    in float64. compiled: what was compiled, of any chunk. apart: of this chunk; expected, drawn: what the engine finds
    of it, and the states of the random numbers after it.

    Whether a ReLU rounds the other way is chance, a wrong function is wrong of any bits: so the least of its distances
    counts, and the least of the eager engine's own. Of the largest of these one unlucky rounding excused any error.
    """
    if _least(learner) < TOLERANCE:
        return False
    found, distances = [expected], [apart]
    moved = map(_repeated, _moved(chunk, torch.finfo(torch.float32).eps))
    for rounded in islice(moved, 2 if _floating(chunk) else 0):
        found.append(_run(partial(find, rounded))[0])
        again = _run(partial(compiled, rounded))[0]
        distances.append(_apart(learner, again, found[-1]))
        if max(distances[-1]) <= TOLERANCE:
            return True

    def explained(own: Sequence[tuple[float, float]]) -> bool:
        pairs = zip(map(min, zip(*distances)), map(min, zip(*own)))
        return all(off <= max(TOLERANCE, 2 * itself) for off, itself in pairs)

    own = [_apart(learner, *pair) for pair in itertools.combinations(found, 2)]
    if own and explained(own):
        return True
    try:
        exact, drawn_exactly = _run(lambda: _exactly_found(learner, find, chunk))
    except Exception:  # whatever a module raises that does not run in float64
        return False
    if not _same(drawn_exactly, drawn):
        return False  # float64 draws other numbers
    return explained([_apart(learner, each, exact) for each in found])


def _exactly_found(learner: MetaLearner, find: Find, chunk: Task) -> Results:
    """What the eager engine finds in float64: on a CPU where the device may lack it."""
    device = device_of(chunk)
    device = device if device.type == "cuda" else torch.device("cpu")
    holder = Holder(learner)
    state = {}
    for name, tensor in (*holder.named_parameters(), *holder.named_buffers()):
        exact = tensor.detach().to(device, torch.float64 if tensor.is_floating_point() else None)
        state[name] = exact.requires_grad_(tensor.requires_grad)
    return holder.at(state, chunk.to(device).to(dtype=torch.float64), find)


def _apart(learner: MetaLearner, found: Results, expected: Results) -> tuple[float, float]:
    """How far losses and outputs, and gradients, are from the expected ones, relative to the norm of each tensor.

    A gradient that is small beside the others, as that of a bias before a batch norm, which is nothing but rounding,
    is measured by `SMALL` of the norm of all.
    """
    slopes = expected.slopes(learner)
    least = SMALL * _norm(slopes)
    values = zip(leaves(found.values()), leaves(expected.values()))
    return (
        max((_off(one, other, _norm([other])) for one, other in values), default=0.0),
        max(
            (
                _off(one, other, max(_norm([other]), least))
                for one, other in zip(found.slopes(learner), slopes)
            ),
            default=0.0,
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
    # on the CPU, as a device may lack float64
    return tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float64))


def _moved(tasks: Task, by: float = 0.01) -> Iterator[Task]:
    """The tasks with noise of this relative size on their inputs, without end; whole numbers go to other examples."""
    for seed in itertools.count(1):
        draw = torch.Generator().manual_seed(seed)

        def move(inputs: Tensor, draw=draw, seed=seed) -> Tensor:
            if not inputs.is_floating_point():
                return inputs if _floating(tasks) else inputs.roll(seed, 1)
            noise = torch.randn(inputs.shape, generator=draw).to(inputs)
            return inputs + by * inputs.abs().mean() * noise

        yield Task(*(part._replace(inputs=mapped(move, part.inputs)) for part in tasks))


def _repeated(tasks: Task) -> Task:
    """The tasks with the first `DISTINCT` examples of each set in place of all, again and again: all is computed as
    of others, but there are fewer numbers that may be rounded to another side of 0.
    """

    def of(inputs: Tensor) -> Tensor:
        number = inputs.shape[1]
        return (
            inputs if number <= DISTINCT else inputs[:, torch.arange(number, device=inputs.device) % DISTINCT]
        )

    return Task(*(part._replace(inputs=mapped(of, part.inputs)) for part in tasks))


def _floating(tasks: Task) -> bool:
    """Whether inputs can be moved a little: one tensor of them at least."""
    return any(leaf.is_floating_point() for leaf in leaves(tasks.support.inputs))
