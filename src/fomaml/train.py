"""The outer loop as a generator: it yields what happened, and the caller prints, saves and stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomaml.data.source import ClassSource
from fomaml.engines import Plan, check_outputs
from fomaml.engines import plan as make_plan
from fomaml.episodes import Episodes, TaskSequence, ways_of
from fomaml.errors import InputError, in_one_line, positive
from fomaml.learning.algorithms import FOMAML
from fomaml.learning.learner import MetaLearner
from fomaml.metrics import metric_for
from fomaml.tasks import Task


class Record(NamedTuple):
    """One outer step. iteration: from 1. meta_loss: (), the mean query loss at φ_K, on its device.

    before, after: () mean query accuracy at θ and at φ_K (classification) or the mean query loss
    (regression), both before this outer step moves θ; None unless asked for by `measure_every`.
    """

    iteration: int
    meta_loss: Tensor
    before: Tensor | None
    after: Tensor | None


def train(
    learner: MetaLearner,
    episodes: TaskSequence,
    optimizer: torch.optim.Optimizer,
    *,
    iterations: int,
    meta_batch_size: int,
    start: int = 0,
    schedule: Callable[[int], float] | None = None,
    measure_every: int = 1,
    clip: float | None = None,
    engine: str = "auto",
    tasks_at_once: int | None = None,
    compile: bool = False,
    autocast: torch.dtype | None = None,
    plan: Plan | None = None,
) -> Iterator[Record]:
    """Meta-train `learner` in place on episodes start · meta_batch_size … (Finn et al. 2017, algorithm 1).

    Iteration i uses the episodes i · meta_batch_size and following, so a run continues exactly from
    `start`, the learner's parameters and the optimiser's state.

    episodes: what has `batch(start, tasks) -> Task`, see `TaskSequence`.
    optimizer: over the learner's parameters; its step sizes at this call are the meta_lr.
    schedule: iteration (from 0) → factor of the meta_lr.
    measure_every: on every so-many-th iteration, and the last, the record has `before` and `after`.
    clip: the largest norm of the whole meta-gradient; a longer one is scaled down to it.
    engine, tasks_at_once, compile, autocast: of the plan for the whole run, see `engines.plan`.
    plan: in place of these four, a plan of the caller's for this learner, whose `tasks_at_once` a run can save and
        its continuation begin with.

    Raises:
        InputError: counts that are not positive, outputs narrower than the number of ways, a
            meta-loss that is no longer finite, or a plan and what would make one, or one for another learner.
    """
    positive("iterations", iterations, integer=True)
    positive("meta_batch_size", meta_batch_size, integer=True)
    positive("measure_every", measure_every, integer=True)
    asked: dict[str, Any] = {
        "engine": engine,
        "tasks_at_once": tasks_at_once,
        "compile": compile,
        "autocast": autocast,
    }
    if plan is not None:
        check_plan(plan, learner, asked)
    check_width(learner, episodes)
    for iteration in range(start, iterations):
        learner.iteration = iteration
        tasks = episodes.batch(iteration * meta_batch_size, meta_batch_size)
        measured = (iteration + 1) % measure_every == 0 or iteration + 1 == iterations
        plan = plan or make_plan(learner, tasks, **asked)
        before = score_before(plan, tasks) if measured else None
        result = plan(tasks)
        if schedule is not None:
            factor = schedule(iteration)
            for group in optimizer.param_groups:
                # "initial_lr" as torch's schedulers keep it: saved with the optimiser, so a run resumes with it
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        result.apply_to(learner)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(learner.meta_parameters().values(), clip)
        learner.carry_moments(tasks)
        optimizer.step()
        optimizer.zero_grad()
        learner.update_statistics(tasks)
        meta_loss = result.query_losses.mean()
        after = None
        if measured:
            after = scores(result.query_outputs, tasks.query.targets, result.query_losses).mean()
            check_finite(meta_loss.item(), iteration + 1)
        yield Record(iteration + 1, meta_loss, before, after)


def cosine(iterations: float) -> Callable[[float], float]:
    """A schedule from 1 to 0 along half a cosine (Loshchilov & Hutter 2017, eq. 5, one period)."""
    return lambda iteration: 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def linear(iterations: float) -> Callable[[float], float]:
    """A schedule from 1 to 0 along a line: Reptile's (Nichol et al. 2018, section 6.1)."""
    return lambda iteration: 1 - iteration / iterations


def scores(outputs: Tensor, targets: Tensor, losses: Tensor | None) -> Tensor:
    """(tasks,) per-task accuracy in [0, 1] if the targets are labels, else the losses as they are."""
    return metric_for(targets).score(outputs, targets, losses)


@torch.no_grad()
def score_before(plan: Plan, tasks: Task) -> Tensor:
    """The mean score of the meta-model itself on the query sets, before any adaptation."""
    [(losses, outputs)] = plan.curve(tasks, [(0, "own")])
    return scores(outputs, tasks.query.targets, losses).mean()


def check_width(learner: MetaLearner, episodes: TaskSequence) -> None:
    """Raise `InputError` where the model's output is narrower than the number of ways."""
    check_outputs(learner, episodes.batch(0, 1), ways_of(episodes))


def check_finite(meta_loss: float, iteration: int) -> None:
    """Raise `InputError` where a meta-loss is no longer finite."""
    if not math.isfinite(meta_loss):
        raise InputError(
            f"the meta-loss is {meta_loss} at iteration {iteration}: try a smaller inner_lr or meta_lr"
        )


def check_plan(plan: Plan, learner: MetaLearner, asked: dict[str, Any]) -> None:
    """Raise `InputError` where a plan is another learner's, or comes with arguments that it has settled."""
    if plan.learner is not learner:
        raise InputError("the plan was made for another learner; make one for this one")
    plain = {"engine": "auto", "tasks_at_once": None, "compile": False, "autocast": None}
    for name, value in asked.items():
        if value != plain[name]:
            raise InputError(f"{name}={value!r} goes to engines.plan, not to train beside a plan")


def fomaml_train(
    model: torch.nn.Module,
    train_dataset,
    num_iterations: int,
    num_inner_updates: int,
    inner_lr: float,
    meta_lr: float,
    *,
    ways: int = 5,
    shots: int = 5,
    query_shots: int = 15,
    meta_batch_size: int = 16,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> list[float]:
    """Meta-train `model` in place by FOMAML on tasks drawn from an ordinary labelled dataset.

    train_dataset: a `ClassSource`, or all that `ClassSource.from_dataset` reads: a dataset or iterable of (input,
        label) pairs, a `DataLoader`; inputs may be PIL images, arrays or tensors. It is read once into memory, on the
        model's device, and drawn in the model's floating dtype. Each task takes `ways` of its classes under a random
        relabelling, `shots` support and `query_shots` query examples of each.
    num_inner_updates, inner_lr: the inner SGD. meta_lr: the step size of the outer SGD.
    report: receives one line with the meta-loss every 10 iterations.

    Returns the meta-loss of every iteration. Source: Finn et al. 2017, section 5.2.

    Raises:
        InputError: numbers that are not positive, fewer classes than ways, classes with too few
            examples, or a model whose output is narrower than `ways`.
    """
    num_iterations = positive("num_iterations", num_iterations, integer=True)
    meta_lr = positive("meta_lr", meta_lr)
    inner_steps = positive("num_inner_updates", num_inner_updates, integer=True)
    learner = FOMAML(model, positive("inner_lr", inner_lr), inner_steps)
    source = train_dataset
    if not isinstance(source, ClassSource):
        source = ClassSource.from_dataset(train_dataset)
    source = _for_model(source, model)
    episodes = Episodes(source, ways=ways, shots=shots, query_shots=query_shots, seed=seed)
    try:
        check_width(learner, episodes)
    except RuntimeError as error:
        if source.inputs.is_floating_point() or source.take(torch.tensor([0])).is_floating_point():
            raise
        raise InputError(
            f"the model does not take inputs of {source.inputs.dtype} ({in_one_line(error)}); convert them, or give "
            "ClassSource.from_dataset(dataset, decode=pixels()), with pixels of fomaml.data.source, for images"
        ) from error
    optimizer = torch.optim.SGD(model.parameters(), lr=meta_lr)
    losses = []
    for record in train(
        learner,
        episodes,
        optimizer,
        iterations=num_iterations,
        meta_batch_size=meta_batch_size,
        measure_every=10,
    ):
        losses.append(record.meta_loss.item())
        if record.iteration % 10 == 0:
            report(f"iteration {record.iteration}: meta-loss {losses[-1]:.4f}")
    return losses


def _for_model(source: ClassSource, model: torch.nn.Module) -> ClassSource:
    """The source on the model's device; floating inputs are drawn in a dtype of its parameters, as numpy's float64 is
    seldom one.
    """
    parameters = list(model.parameters())
    dtypes = [parameter.dtype for parameter in parameters if parameter.is_floating_point()]
    own = source.decode

    def decode(inputs: Tensor) -> Tensor:
        inputs = inputs if own is None else own(inputs)
        return inputs.to(dtypes[0]) if inputs.is_floating_point() and inputs.dtype not in dtypes else inputs

    moved = source.to(parameters[0].device)
    if dtypes:
        moved.decode = decode
    return moved
