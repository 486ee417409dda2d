"""Numbers that are not finite in an outer step: noticed before they are kept, and told where they came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fomaml.engines.plan import plan as make_plan
from fomaml.errors import InputError
from fomaml.learning.learner import MetaLearner
from fomaml.tasks import Batch, check_finite_tasks, singles

IN_A_ROW = 100  # outer steps that are skipped before a training is given up
SMALL = 100_000  # numbers
SUMMED = (torch.float32, torch.float64)
YES = torch.tensor(True)
LARGE = 1e6  # no meta-parameter that means something


class NotFiniteError(InputError):
    """A meta-loss, a meta-gradient or a meta-parameter is no longer finite.

    iteration: the outer step, from 1. found: whether its cause was looked for, at the meta-parameters before it.
    """

    def __init__(self, iteration: int, text: str, found: bool = True):
        super().__init__(text)
        self.iteration, self.found = iteration, found


@torch.no_grad()
def are_finite(tensors: Iterable[Tensor]) -> Tensor:
    """(), bool on the device: whether all numbers of dense tensors are finite; whole numbers are."""
    floats = [t for t in tensors if t.dtype in SUMMED or t.is_floating_point() or t.is_complex()]
    floats = [t for t in floats if t.numel()]
    if not floats:
        return YES
    summed = all(t.is_cpu and t.dtype in SUMMED for t in floats)
    # a sum is quicker than a norm, and finite only where all numbers are
    if summed and all(math.isfinite(t.sum()) for t in _joined(floats)):
        return YES
    return torch.nn.utils.get_total_norm(floats, math.inf).isfinite()


def _joined(floats: list[Tensor]) -> list[Tensor]:
    """Small tensors in one, as looking at each takes longer than they do."""
    if sum(t.numel() for t in floats) > SMALL or len({t.dtype for t in floats}) > 1:
        return floats
    return [torch.cat([t.reshape(-1) for t in floats])]


def not_finite(tensors: Mapping[str, Tensor]) -> set[str]:
    """The names of those tensors that hold numbers which are not finite. It waits for the device."""
    return {name for name, tensor in tensors.items() if not are_finite([tensor]).item()}


def cause(learner: MetaLearner, tasks: Batch, first: int | None, iteration: int) -> NotFiniteError:
    """What made the meta-loss or the meta-gradient of these tasks no longer finite: each task is computed alone, by
    `loop`, at the meta-parameters as they are.

    The error names the data, the outer steps before, the model or its loss, the inner loop or the meta-gradient.
    first: the number of the first task; None of a stream, whose tasks have none. iteration: from 1.
    """
    name, largest = _largest(learner)
    if not largest <= LARGE:
        return NotFiniteError(
            iteration,
            f"the meta-loss is not finite at iteration {iteration}: the outer steps before have made the "
            f"meta-parameter {name} as large as {largest:.3g}: try a smaller meta_lr, or clip the meta-gradient",
        )
    for index, task in enumerate(singles(tasks)):
        which = f"task {index} of the meta-batch" if first is None else f"task {first + index}"
        at = f"at iteration {iteration}, {which}"
        try:
            check_finite_tasks(task)
        except InputError as error:
            text = str(error).replace("task 0 of a batch", which)
            return NotFiniteError(iteration, f"{text}, which iteration {iteration} needs: mend the data")
        result = make_plan(learner, task, engine="loop")(task)
        support, query = result.support_losses.flatten().tolist(), result.query_losses.sum().item()
        wrong = next((step for step, loss in enumerate(support) if not math.isfinite(loss)), None)
        if wrong == 0 or (not support and not math.isfinite(query)):
            loss = support[0] if support else query
            return NotFiniteError(
                iteration,
                f"the meta-loss is {loss} {at}: the loss is not finite before any inner step, while the data and the "
                "meta-parameters are: look at the model and its loss",
            )
        if wrong is not None or not math.isfinite(query):
            loss, step = (query, len(support)) if wrong is None else (support[wrong], wrong)
            return NotFiniteError(
                iteration,
                f"the meta-loss is {loss} {at}: the inner loop diverges, its loss is not finite after {step} of "
                f"{len(support)} inner steps: try a smaller inner_lr",
            )
        if wrong_names := sorted(not_finite(result.gradients)):
            return NotFiniteError(
                iteration,
                f"the meta-gradient of {wrong_names[0]} is not finite {at}, while all losses are: try a smaller "
                "inner_lr, or look for a square root or a logarithm at 0 in the model",
            )
    return NotFiniteError(
        iteration,
        f"the meta-loss or the meta-gradient is not finite at iteration {iteration}, while those of each task alone "
        "are: try autocast none or float64, or another engine",
    )


def of_outer_step(learner: MetaLearner, iteration: int) -> NotFiniteError:
    """That an outer step with a finite meta-gradient has made the meta-parameters not finite."""
    name, largest = _largest(learner)
    return NotFiniteError(
        iteration,
        f"the outer step of iteration {iteration} made the meta-parameter {name} {largest:.3g}, though its "
        "meta-gradient was finite: try a smaller meta_lr",
    )


@contextmanager
def told_of_overflow(iteration: int) -> Iterator[None]:
    """Within an outer step: torch refuses a step size that the dtype cannot hold, such as Adam's first ones of 1e38."""
    try:
        yield
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        raise NotFiniteError(
            iteration,
            f"the outer step of iteration {iteration} is too large to be computed: try a smaller meta_lr",
        ) from None


def unsound(iteration: int) -> NotFiniteError:
    """That a training has gone on with numbers that are not finite, so that their cause was not looked for."""
    return NotFiniteError(
        iteration,
        f"the meta-loss or the meta-gradient is not finite from iteration {iteration} on: try a smaller inner_lr or "
        "meta_lr, or check_each=True, which names the cause",
        found=False,
    )


def not_sound(iteration: int, what: str) -> NotFiniteError:
    """That something which is to be saved is not finite after this iteration."""
    return NotFiniteError(
        iteration,
        f"{what} is not finite after iteration {iteration}, and is not saved; the last good state is kept: try a "
        "smaller meta_lr or inner_lr",
    )


def _largest(learner: MetaLearner) -> tuple[str, float]:
    """The meta-parameter with the largest number, or the first that is not finite, and that number."""
    found = {
        name: parameter.detach().abs().max().item()
        for name, parameter in learner.meta_parameters().items()
        if parameter.numel()
    }
    for name, value in found.items():
        if not math.isfinite(value):
            return name, value
    return max(found.items(), key=lambda item: item[1])
