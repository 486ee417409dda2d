"""The outer loop as a generator: it yields what happened, and the caller prints, saves and stops."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomaml.ahead import Ahead
from fomaml.choices import OnNonfinite, check_choice
from fomaml.data.source import ClassSource
from fomaml.devices import forked_random
from fomaml.engines import Plan
from fomaml.engines.pays import Compile
from fomaml.engines.plan import TaskWeights
from fomaml.engines.short import check_outputs_once
from fomaml.episodes import Episodes, TaskSequence
from fomaml.errors import InputError, positive, whole
from fomaml.finite import IN_A_ROW, are_finite, cause, of_outer_step, told_of_overflow, unsound
from fomaml.layout import lay_out
from fomaml.learning.algorithms import FOMAML
from fomaml.learning.learner import MetaLearner
from fomaml.metrics import Asked, check_ignored, ignored_label
from fomaml.models import warn_of_unmoved
from fomaml.optimizers import Steps, check_optimizer, fuse, set_rates
from fomaml.outer import Outer, Step, shared
from fomaml.ranks import Ranks, as_ranks
from fomaml.scoring import metrics_of
from fomaml.streams import TaskStream, as_sequence, batch_of
from fomaml.tasks import Batch, Task, check_finite_tasks, singles
from fomaml.threads import alone


class Record(NamedTuple):
    """One outer step. iteration: from 1. meta_loss: (), the mean query loss at φ_K, on its device.

    before, after: () float64 on the CPU, the mean score of the query sets, see `train`'s metric, at θ and at φ_K, both
    before this outer step moves θ; None unless asked for by `measure_every`.
    skipped: whether the outer step was skipped, as its meta-loss or meta-gradient was not finite.
    first_bad: (), int64 on the device: the first iteration so far whose meta-loss or meta-gradient was not finite, 0
    while there is none; None where each one is checked before it is taken.
    """

    iteration: int
    meta_loss: Tensor
    before: Tensor | None
    after: Tensor | None
    skipped: bool = False
    first_bad: Tensor | None = None


def train(
    learner: MetaLearner,
    episodes: TaskSequence,
    optimizer: torch.optim.Optimizer,
    *,
    iterations: int,
    meta_batch_size: int,
    start: int = 0,
    schedule: Callable[[int], float] | None = None,
    measure_every: int | None = None,
    clip: float | None = None,
    engine: str = "auto",
    tasks_at_once: int | None = None,
    compile: Compile = "auto",
    autocast: torch.dtype | None = None,
    plan: Plan | None = None,
    metric: Asked = None,
    task_weights: TaskWeights = "equal",
    on_nonfinite: OnNonfinite = "stop",
    check_each: bool | None = None,
    group: Any = None,
) -> Iterator[Record]:
    """Meta-train `learner` in place on episodes start · meta_batch_size … (Finn et al. 2017, algorithm 1).

    Iteration i uses the episodes i · meta_batch_size and following, so a run continues exactly from
    `start`, the learner's parameters and the optimiser's state.

    episodes: what has `batch(start, tasks)`, which gives stacked tasks or a list of them, see `TaskSequence`; or an
        iterable of single tasks, or a `DataLoader` of them, in one process and from the start alone.
    optimizer: over the learner's parameters; its step sizes at this call are the meta_lr.
    schedule: iteration (from 0) → factor of the meta_lr.
    measure_every: on every so-many-th iteration, and the last, the record has `before` and `after`, which cost another
        forward pass; by default a hundred times or more seldom, see `measured_by_default`.
    clip: the largest norm of the whole meta-gradient; a longer one is scaled down to it.
    engine, tasks_at_once, compile, autocast, task_weights: of the plan for the whole run, see `engines.plan`. Whether
        "auto" compiles depends on all `iterations`, so that a training that goes on from `start` decides the same.
    plan: in place of these five, a plan of the caller's for this learner, whose `tasks_at_once` a run can save and
        its continuation begin with.
    metric: what records score by, as in `evaluate`; the mean over the tasks, whatever their weights. Of a learner with
        a `loss` a metric other than the loss is computed in evaluation mode.
    on_nonfinite: "stop" raises an error where a meta-loss or a meta-gradient is not finite; "skip" leaves out that
        outer step, and raises it after 100 in a row.
    check_each: whether each meta-loss and meta-gradient is checked before its outer step, so that the meta-parameters
        never take up a number that is not finite. By default on a CPU and to skip; elsewhere, where that would wait for
        the device each time, at measured iterations, see `Record.first_bad`.
    group: of torch.distributed, such as `torch.distributed.group.WORLD`, whose processes all make this call and take
        all records; or `fomaml.ranks.Ranks`, which can have the same bits for any number of processes. Each computes
        its share of a meta-batch, and begins with rank 0's parameters. Records are the same on all of them.

    Raises:
        InputError: at the call, counts that are not positive, a start beyond the iterations, outputs narrower than the
            number of ways, an optimiser of other parameters, or a plan and what would make one, or one for another
            learner; later, as `fomaml.finite.NotFiniteError`, numbers that are no longer finite, and what made them so.

    Warns: an optimiser that does not hold all meta-parameters; batch norms that normalise by statistics which nothing
    has ever moved.
    """
    ranks = as_ranks(group)
    with ranks.agreeing():
        iterations = positive("iterations", iterations, integer=True)
        meta_batch_size = positive("meta_batch_size", meta_batch_size, integer=True)
        if measure_every is None:
            measure_every = measured_by_default(iterations)
        measure_every = positive("measure_every", measure_every, integer=True)
        if clip is not None:
            clip = positive("clip", clip)
        start = whole("start", start)
        check_choice("on_nonfinite", on_nonfinite, OnNonfinite)
        if start > iterations:
            raise InputError(f"start is iteration {start} of {iterations}: it must not lie beyond them")
        asked: dict[str, Any] = {
            "engine": engine,
            "tasks_at_once": tasks_at_once,
            "compile": compile,
            "autocast": autocast,
            "task_weights": task_weights,
        }
        if plan is not None:
            check_plan(plan, learner, asked)
        [score] = metrics_of(learner, [metric])
        check_optimizer(optimizer, learner)
        if schedule is not None and not callable(schedule):
            raise InputError(
                f"schedule is a function of the iteration, from 0, to a factor of the step size; got a "
                f"{type(schedule).__name__}: a scheduler of torch is stepped beside the records"
            )
        warn_of_unmoved(learner.model)
        episodes = as_sequence(episodes, learner.model, start)
        check_width(learner, episodes)
    told = start, iterations, measure_every, clip, on_nonfinite, check_each
    asked["iterations"] = iterations
    ahead = Ahead(episodes, meta_batch_size, iterations * meta_batch_size)
    outer = shared(group, Outer(learner, ahead, meta_batch_size, score, plan, asked), optimizer, told)
    meta_parameters = learner.meta_parameters()
    on_cpu = all(parameter.device.type == "cpu" for parameter in meta_parameters.values())
    stepper = Steps(optimizer)
    check_each = on_nonfinite == "skip" or (on_cpu if check_each is None else check_each)

    def taken(step: Step, iteration: int) -> None:
        for name, parameter in meta_parameters.items():
            parameter.grad = step.gradients[name]
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(meta_parameters.values(), clip)
        outer.carry_moments(step, iteration)
        with told_of_overflow(iteration + 1):
            stepper.take()
        for parameter in meta_parameters.values():
            parameter.grad = None
        outer.update_statistics(step, iteration)
        if check_each and not are_finite(meta_parameters.values()):
            raise of_outer_step(learner, iteration + 1)

    def steps() -> Iterator[Record]:
        checked, skipped = start, 0
        first_bad: Tensor | None = None
        optimizer.zero_grad()  # what an earlier backward pass has left is none of this
        lay_out(optimizer)
        for iteration in range(start, iterations):
            learner.iteration = iteration
            measured = (iteration + 1) % measure_every == 0 or iteration + 1 == iterations
            step = outer.step(iteration, measured)
            between = on_cpu and outer.plan is not None and bool(outer.plan.compile)
            with alone(between):
                good = are_finite([step.meta_loss, *step.gradients.values()])
            if not check_each:
                if first_bad is None:
                    first_bad = torch.zeros((), dtype=torch.int64, device=step.meta_loss.device)
                first_bad = torch.where((first_bad == 0) & ~good, iteration + 1, first_bad)
            elif not good:
                number = None if isinstance(episodes, TaskStream) else iteration * meta_batch_size
                skipped += 1
                if on_nonfinite == "stop" or skipped == IN_A_ROW:
                    with forked_random(step.random):
                        raise cause(learner, outer.all_tasks(step, iteration), number, iteration + 1)
                yield Record(iteration + 1, step.meta_loss, None, None, skipped=True)
                continue
            skipped = 0
            if schedule is not None:
                set_rates(optimizer, schedule(iteration), iteration)
            fuse(optimizer, step.gradients.values())
            with alone(between):
                taken(step, iteration)
            after = None
            if step.after is not None:
                if first_bad is not None and first_bad.item():
                    indices = range(
                        checked * meta_batch_size, (iteration + 1) * meta_batch_size, meta_batch_size
                    )
                    check_data(learner, episodes, indices, meta_batch_size)
                    raise unsound(int(first_bad.item()))
                after = step.after()
                checked = iteration + 1
            record = Record(iteration + 1, step.meta_loss, step.before, after, first_bad=first_bad)
            del step  # with its tasks, whose memory the next ones take
            yield record

    return _Training(steps(), ranks)


class _Training(Iterator[Record]):
    """The records of a training, which runs while they are taken; that none was taken is a warning."""

    def __init__(self, records: Iterator[Record], ranks: Ranks):
        self._records = records
        self._ranks = ranks
        self._begun = False

    def __next__(self) -> Record:
        self._begun = True
        with self._ranks.computing():
            return next(self._records)

    def __del__(self):
        if not getattr(self, "_begun", True):
            text = "train(...) was never iterated, and so trained nothing: for record in train(...)"
            warnings.warn(text, RuntimeWarning, stacklevel=2)


def measured_by_default(iterations: int) -> int:
    """Every so-many-th iteration: a hundred in all of a long run, of a short one every tenth, of one below 100 ten."""
    return max(1, iterations // 100, min(10, iterations // 10))


def check_data(learner: MetaLearner, episodes: TaskSequence, indices: Iterable[int], tasks: int) -> None:
    """Raise `InputError` where tasks hold numbers that are not finite, or no label that the criterion counts.

    indices: of the first of so many tasks each.
    """
    for index in indices if not isinstance(episodes, TaskStream) else list(indices)[-1:]:
        batch = batch_of(episodes, index, tasks, learner.model)
        check_labels(learner, batch)
        check_finite_tasks(batch, index)


def cosine(iterations: float) -> Callable[[float], float]:
    """A schedule from 1 to 0 along half a cosine (Loshchilov & Hutter 2017, eq. 5, one period)."""
    return lambda iteration: 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def linear(iterations: float) -> Callable[[float], float]:
    """A schedule from 1 to 0 along a line: Reptile's (Nichol et al. 2018, section 6.1)."""
    return lambda iteration: 1 - iteration / iterations


def check_width(learner: MetaLearner, episodes: TaskSequence) -> None:
    """Raise `InputError` where the criterion is a cross-entropy that does not go with the first task: outputs narrower
    than its classes, labels below 0 or all ignored, a single class, targets that are no probabilities.
    """
    task = batch_of(episodes, 0, 1, learner.model)
    check_labels(learner, task)
    check_outputs_once(learner, task)


def check_labels(learner: MetaLearner, tasks: Batch) -> None:
    """Raise `InputError` where the criterion ignores all labels of a support or query set."""
    ignored = ignored_label(learner.criterion)
    if ignored is None:
        return
    for batch in [tasks] if isinstance(tasks, Task) else singles(tasks):
        for name, (_, targets) in zip(Task._fields, batch):
            if isinstance(targets, Tensor):
                check_ignored(name, targets, ignored)


def check_plan(plan: Plan, learner: MetaLearner, asked: dict[str, Any]) -> None:
    """Raise `InputError` where a plan is another learner's, or comes with arguments that it has settled."""
    if plan.learner is not learner:
        raise InputError("the plan was made for another learner; make one for this one")
    plain = {
        "engine": "auto", "tasks_at_once": None, "compile": "auto", "autocast": None, "task_weights": "equal",
    }  # fmt: skip
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
