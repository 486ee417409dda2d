"""The same network without meta-learning: trained on all tasks pooled, as it is or fine-tuned, or from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.baselines.pool import Training, batches_of, fit_together
from fomaml.choices import Statistics
from fomaml.episodes import TaskSequence, copies_of, ways_of
from fomaml.errors import InputError, positive, whole
from fomaml.evaluate import evaluate
from fomaml.learning.algorithms import FOMAML
from fomaml.learning.contracts import (
    Criterion,
    Loss,
    Output,
    checked_criterion,
    checked_loss_function,
    checked_output,
    module_of,
)
from fomaml.learning.forward import Forward, called
from fomaml.learning.learner import Choices, MetaLearner
from fomaml.learning.mistakes import checked_loss, checked_outputs, selected, targets_for
from fomaml.learning.rates import ConstantRates, by_name
from fomaml.metrics import Asked, Metric, as_asked
from fomaml.models import Seen, is_moving, normalising
from fomaml.scoring import metrics_of
from fomaml.streams import check_sequence
from fomaml.tasks import Batch, Examples, are_labels, count_of
from fomaml.trees import Tree, joined
from fomaml.tuning import LogUniform, Trial, search

if TYPE_CHECKING:
    from typing_extensions import Unpack


MOMENTUM = 0.1  # of running statistics, as of `MetaLearner.update_statistics`
Scores = TypeVar("Scores", Tensor, dict[str, Tensor])


@dataclass(frozen=True)
class Tuned(Generic[Scores]):
    """A baseline's (tasks,) scores, of a list of metrics by name, and the inner step size and count that it was tuned
    to.

    trials: of a search, those that were made for it.
    """

    scores: Scores
    inner_lr: float
    steps: int
    trials: Sequence[Trial] = ()


@overload
def unadapted(
    model: nn.Module,
    episodes: TaskSequence,
    *,
    tasks: int = 1000,
    statistics: Statistics = "own",
    criterion: Criterion | None = None,
    metric: Asked = None,
    **choices: Unpack[Choices],
) -> Tensor: ...
@overload
def unadapted(
    model: nn.Module,
    episodes: TaskSequence,
    *,
    tasks: int = 1000,
    statistics: Statistics = "own",
    criterion: Criterion | None = None,
    metric: list[Asked],
    **choices: Unpack[Choices],
) -> dict[str, Tensor]: ...
def unadapted(
    model: nn.Module,
    episodes: TaskSequence,
    *,
    tasks: int = 1000,
    statistics: Statistics = "own",
    criterion: Criterion | None = None,
    metric: Asked | list[Asked] = None,
    **choices: Unpack[Choices],
) -> Tensor | dict[str, Tensor]:
    """(tasks,) float64 scores of a model as it is, without adaptation.

    It is for tasks that share their classes or their function; where classes are numbered anew it can but guess.
    choices, statistics, metric: as of `fine_tune`.
    """
    learner = FOMAML(model, 1.0, 1, criterion, **choices)
    own = metrics_of(learner, metric if isinstance(metric, list) else [metric])
    found = evaluate(
        learner, episodes, tasks=tasks, at_steps=[0], statistics=statistics, metric=list[Asked](own)
    )
    return as_asked(metric, {name: scores[0] for name, scores in found.items()})


@overload
def fine_tune(
    model: nn.Module | Callable[[int], nn.Module],
    tuning_episodes: TaskSequence,
    episodes: TaskSequence,
    *,
    tasks: int = 1000,
    tuning_tasks: int = 100,
    inner_lrs: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1),
    at_steps: Sequence[int] = (5, 20, 50, 100),
    trials: int | None = None,
    seed: int = 0,
    statistics: Statistics = "own",
    criterion: Criterion | None = None,
    metric: Asked = None,
    **choices: Unpack[Choices],
) -> Tuned[Tensor]: ...
@overload
def fine_tune(
    model: nn.Module | Callable[[int], nn.Module],
    tuning_episodes: TaskSequence,
    episodes: TaskSequence,
    *,
    tasks: int = 1000,
    tuning_tasks: int = 100,
    inner_lrs: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1),
    at_steps: Sequence[int] = (5, 20, 50, 100),
    trials: int | None = None,
    seed: int = 0,
    statistics: Statistics = "own",
    criterion: Criterion | None = None,
    metric: list[Asked],
    **choices: Unpack[Choices],
) -> Tuned[dict[str, Tensor]]: ...
def fine_tune(
    model: nn.Module | Callable[[int], nn.Module],
    tuning_episodes: TaskSequence,
    episodes: TaskSequence,
    *,
    tasks: int = 1000,
    tuning_tasks: int = 100,
    inner_lrs: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1),
    at_steps: Sequence[int] = (5, 20, 50, 100),
    trials: int | None = None,
    seed: int = 0,
    statistics: Statistics = "own",
    criterion: Criterion | None = None,
    metric: Asked | list[Asked] = None,
    **choices: Unpack[Choices],
) -> Tuned[Any]:
    """Train a model on each support set by gradient descent; step size and count tuned on other episodes.

    tuning_episodes: of validation tasks, or of training tasks. A model that was trained on their query sets takes
        smaller steps there than suit it elsewhere.
    trials: search so many pairs of a step size and a count, between the least and the greatest of `inner_lrs` and of
        `at_steps`, by `fomaml.tuning` with this seed. None: try all of `inner_lrs` at all of `at_steps`.
    choices: further arguments of `FOMAML`, such as `loss`, `output`, or `adapted` for the last layers alone.
    statistics, metric: as in `evaluate`; the best is tuned for in the metric's direction. Of a list of metrics the
        first one is tuned by, and the scores are of each, by name, of the same adaptation.
    model: the start for every task, or a function from a number to a fresh random start: then every
        hundred tasks get a start of their own.
    """

    asked = metric if isinstance(metric, list) else [metric]
    metrics = metrics_of(FOMAML(nn.Linear(1, 1), 1.0, 1, criterion, loss=choices.get("loss")), asked)
    first = metrics[0]
    known: list[MetaLearner] = []

    def learner_at(number: int, inner_lr: float, steps: int) -> MetaLearner:
        """The learner of a start; of one start for all tasks the same one with other step sizes, as which engines take
        it is found out by trying, which takes longer than many a task.
        """
        if not isinstance(model, nn.Module):
            return FOMAML(model(number), inner_lr, steps, criterion, **choices)
        rates = known[0].inner_lr if known else None
        if not isinstance(rates, ConstantRates):
            known[:] = [FOMAML(model, inner_lr, steps, criterion, **choices)]
        else:
            rates.sizes = by_name(known[0].adapted, inner_lr)
            known[0].inner_steps = steps
        return known[0]

    def run(
        episodes: TaskSequence, tasks: int, inner_lr: float, at_steps: Sequence[int], metrics: list[Metric]
    ) -> dict[str, dict[int, Tensor]]:
        parts = []
        for number in range(math.ceil(tasks / 100)):
            learner = learner_at(number, inner_lr, max(1, *at_steps))
            part = _Slice(episodes, 100 * number)
            few = min(100, tasks - 100 * number)
            found = evaluate(
                learner,
                part,
                tasks=few,
                at_steps=at_steps,
                statistics=statistics,
                metric=list[Asked](metrics),
            )
            parts.append(found)
        return {
            metric.name: {
                steps: torch.cat([part[metric.name][steps] for part in parts]) for steps in at_steps
            }
            for metric in metrics
        }

    def tuning(inner_lr: float, at_steps: Sequence[int]) -> dict[int, Tensor]:
        return run(tuning_episodes, tuning_tasks, inner_lr, at_steps, [first])[first.name]

    def worth(found: Tensor) -> float:
        mean = found.mean().item()
        return -math.inf if math.isnan(mean) else first.direction * mean  # nan: it has diverged

    made: Sequence[Trial] = ()
    if trials is None:
        *_, fewest, inner_lr = max(
            (worth(found), -steps, inner_lr)
            for inner_lr in inner_lrs
            for steps, found in tuning(inner_lr, at_steps).items()
        )
        steps = -fewest
    else:
        space = {
            "inner_lr": LogUniform(min(inner_lrs), max(inner_lrs)),
            "steps": LogUniform(min(at_steps), max(at_steps), whole=True),
        }

        def mean_of(settings: dict[str, Any]) -> float:
            return tuning(settings["inner_lr"], [settings["steps"]])[settings["steps"]].mean().item()

        best, made = search(space, trials, mean_of, direction=first.direction, seed=seed)
        inner_lr, steps = best.settings["inner_lr"], best.settings["steps"]
    tested = run(episodes, tasks, inner_lr, [steps], metrics)
    return Tuned(as_asked(metric, {name: own[steps] for name, own in tested.items()}), inner_lr, steps, made)


def pretrain(
    model: nn.Module,
    source: Training,
    *,
    iterations: int = 1000,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    criterion: Criterion | None = None,
    loss: Loss | None = None,
    output: Output = None,
) -> nn.Module:
    """Train `model`, in place, on the examples of all training tasks together (Adam); returns it.

    Running statistics of `BatchNorm` layers move too, those of torch's own as their mode says.

    source: a `ClassSource`, whose classes are all told apart, with as many outputs as there are; a `GroupSource`,
        scaled as it draws its rows, whose classes or targets are those of its tasks; or episodes, of whose tasks
        support and query sets count alike. In a batch of rows each is as likely, so that large groups count for more;
        in one of episodes each task is.
    batch_size: the rows of a batch; of episodes about so many, in whole tasks.
    criterion, loss, output: as of `MetaLearner`; by default the cross-entropy of labels, the squared error of numbers.
        A loss is of one support or query set at a time, and of rows of the whole batch.

    Raises:
        InputError: a loss that is no longer finite, and what `MetaLearner` and the engines refuse of such arguments.
    """
    iterations = positive("iterations", iterations, integer=True)
    batch_size = positive("batch_size", batch_size, integer=True)
    if loss is not None and criterion is not None:
        raise InputError("loss= takes the place of the criterion: give one of the two")
    lr = positive("lr", lr)
    batches = batches_of(source, batch_size, whole("seed", seed), model)
    judge = None if loss is None else checked_loss_function(loss)
    own = None if criterion is None else checked_criterion(criterion)
    output = checked_output(output)
    module = module_of(loss if criterion is None else criterion)
    parameters = {id(p): p for each in (model, module) if each is not None for p in each.parameters()}
    optimizer = torch.optim.Adam(parameters.values(), lr=lr)
    moved = any(map(is_moving, model.modules()))
    for iteration in range(iterations):
        parts = batches(iteration)
        seen: list[Seen] = []
        with normalising(record=seen) if moved else nullcontext():
            if judge is not None:
                losses = [
                    checked_loss(judge(Forward(model, model, part.inputs), part), "loss") for part in parts
                ]
                mean = torch.stack(losses).mean()
            else:
                if len(parts) > 1 and fit_together(parts):
                    parts = [joined(parts)]
                own = default_criterion(parts[0].targets) if own is None else own
                number = sum(map(count_of, parts))
                mean = torch.stack(
                    [_loss(model, own, output, part) * (count_of(part) / number) for part in parts]
                ).sum()
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        _move(seen)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise InputError(f"after {iterations} iterations the parameters are not finite: try a smaller lr")
    return model


@torch.no_grad()
def _move(seen: list[Seen]) -> None:
    """Move running statistics towards those of the batches that were seen, as `MetaLearner.update_statistics` does; the
    sets of all inner steps, as pooled examples know of none.
    """
    for layer, _, mean, variance in seen:
        for step in range(len(layer.mean) if is_moving(layer) else 0):
            layer.update(step, mean, variance, MOMENTUM)


def default_criterion(targets: Tree) -> Criterion:
    """The cross-entropy of labels, the mean squared error of numbers."""
    return F.cross_entropy if are_labels(targets) else F.mse_loss


def _loss(model: nn.Module, criterion: Any, output: Output, examples: Examples) -> Tensor:
    returned = selected(called(model, model, examples.inputs), output)
    outputs = checked_outputs(returned, criterion)
    return checked_loss(criterion(outputs, targets_for(criterion, outputs, examples.targets)))


class _Slice:
    """Episodes from `start` on."""

    def __init__(self, episodes: TaskSequence, start: int):
        check_sequence(episodes)
        self.episodes, self.start = episodes, start
        self.ways, self.copies = ways_of(episodes), copies_of(episodes)

    def batch(self, start: int, tasks: int) -> Batch:
        return self.episodes.batch(self.start + start, tasks)
