"""Adaptation to unseen tasks: the curve over inner steps, its 95 % intervals, test-time augmentation, balance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.choices import Statistics
from fomaml.engines import Plan
from fomaml.engines import plan as make_plan
from fomaml.engines.adaptation import compiles
from fomaml.engines.pays import Compile, check_compile
from fomaml.episodes import TaskSequence, copies_of, ways_of_each
from fomaml.errors import InputError, plain, whole
from fomaml.learning.learner import MetaLearner
from fomaml.measures import exact
from fomaml.metrics import LOSS, Asked, Metric, scores
from fomaml.models import warn_of_unmoved
from fomaml.portions import Portions
from fomaml.ranks import as_ranks
from fomaml.scoring import measured_for, metrics_of, query_targets
from fomaml.streams import batch_of
from fomaml.tasks import Batch, check_finite_tasks, count, device_of
from fomaml.train import check_labels, check_width
from fomaml.trees import Tree, leaves

EVALUATED = 0  # the seed of what a model draws while it is evaluated by a group
SCALINGS = 200  # of rows and columns each; after 100 one of 13 500 images of Omniglot still changed its class


class Estimate(NamedTuple):
    """A mean over tasks and the half-width of its 95 % interval (normal, 1.96 standard errors)."""

    mean: float
    interval: float


def estimate(values: Tensor) -> Estimate:
    """The mean of (tasks,) independent values with its interval; one value has an interval of nan."""
    values = exact(values)
    error = values.std(correction=1).item() if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), 1.96 * error / math.sqrt(len(values)))


@overload
def evaluate(
    learner: MetaLearner,
    episodes: TaskSequence,
    *,
    tasks: int = 1000,
    at_steps: int | Sequence[int] = (0, 1, 5, 10, 20),
    statistics: Statistics = "own",
    balanced: bool = False,
    tasks_at_once: int = 100,
    engine: str = "auto",
    metric: Asked = None,
    group: Any = None,
    compile: Compile = "auto",
) -> dict[int, Tensor]: ...
@overload
def evaluate(
    learner: MetaLearner,
    episodes: TaskSequence,
    *,
    tasks: int = 1000,
    at_steps: int | Sequence[int] = (0, 1, 5, 10, 20),
    statistics: Statistics = "own",
    balanced: bool = False,
    tasks_at_once: int = 100,
    engine: str = "auto",
    metric: list[Asked],
    group: Any = None,
    compile: Compile = "auto",
) -> dict[str, dict[int, Tensor]]: ...
def evaluate(
    learner: MetaLearner,
    episodes: TaskSequence,
    *,
    tasks: int = 1000,
    at_steps: int | Sequence[int] = (0, 1, 5, 10, 20),
    statistics: Statistics = "own",
    balanced: bool = False,
    tasks_at_once: int = 100,
    engine: str = "auto",
    metric: Asked | list[Asked] = None,
    group: Any = None,
    compile: Compile = "auto",
) -> dict[int, Tensor] | dict[str, dict[int, Tensor]]:
    """Adapt to the first `tasks` episodes; per number of inner steps the (tasks,) float64 scores.

    `estimate` sums them up. Of episodes with copies of each image, a query image's outputs are averaged over its copies
    (test-time augmentation; Krizhevsky et al. 2012 average over crops).
    statistics: whose examples batch norms normalise by: "own", as their policies say (transductive where a query
        set is normalised as a whole); "support", the support set, so that query examples do not inform each other
        (inductive); "with-query", the support set and one query example at a time (the published code of Nichol et
        al. 2018).
    balanced: assume that a query set holds the same number of examples per class, see `balance`.
    metric: what a score is; by default "accuracy", in [0, 1], where the criterion is a cross-entropy (`F.nll_loss` too,
        their modules, and `functools.partial` of all these), else "loss", the criterion's. The accuracy is of
        the class axis and without the ignored labels of `F.cross_entropy`. A function (outputs, targets) → a number
        is called for the query set of each task, (examples, ...) each; more counts as better, unless it is given as
        a `fomaml.metrics.Metric`. For a learner with a `loss` a function is called with (forward, examples) instead, as
        the loss is. Of a list of metrics all are computed, and the result is by name, and then by number of steps.
    group: as of `train`: each process of it adapts to its share of the tasks, and all have the scores of all of them.
    compile: trace the adaptation once and compare it with the engine, which takes seconds: True, False, or "auto" where
        the tasks are enough to pay for it, by a rule of their number and operations. Scores are the same up to
        rounding. True warns where it cannot be.

    Raises:
        InputError: outputs narrower than the classes of a cross-entropy, or labels that are below 0 or all ignored; an
            unknown metric, or one that gives no number for each task; balanced, and the queries are not.

    Warns: batch norms that normalise by statistics which nothing has ever moved.
    """
    warn_of_unmoved(learner.model)
    at_steps = plain(at_steps)
    numbers = at_steps if isinstance(at_steps, Iterable) else [at_steps]
    points = [(whole("at_steps", steps), statistics) for steps in numbers]
    if not points:
        raise InputError("at_steps is empty: it says after how many inner steps to score")
    own = metrics_of(learner, metric if isinstance(metric, list) else [metric])
    found = evaluate_all(
        learner, episodes, points, tasks, tasks_at_once, engine, balanced, own, group, compile=compile
    )
    by_name = {name: {steps: s for (steps, _), s in each.items()} for name, each in found.items()}
    return by_name if isinstance(metric, list) else by_name[own[0].name]


def evaluate_at(
    learner: MetaLearner,
    episodes: TaskSequence,
    points: Sequence[tuple[int, Statistics]],
    tasks: int = 1000,
    tasks_at_once: int = 100,
    engine: str = "auto",
    balanced: bool = False,
    metric: Asked = None,
    group: Any = None,
    compile: Compile = "auto",
) -> dict[tuple[int, Statistics], Tensor]:
    """`evaluate` at pairs of steps and statistics: tasks are adapted once for all of them."""
    own = metrics_of(learner, [metric])
    [found] = evaluate_all(
        learner, episodes, points, tasks, tasks_at_once, engine, balanced, own, group, compile=compile
    ).values()
    return found


def evaluate_all(
    learner: MetaLearner,
    episodes: TaskSequence,
    points: Sequence[tuple[int, Statistics]],
    tasks: int,
    tasks_at_once: int,
    engine: str,
    balanced: bool,
    metrics: Sequence[Metric],
    group: Any = None,
    tell: Callable[[int], None] = lambda spoiled: None,
    compile: Compile = "auto",
    times: int = 1,
) -> dict[str, dict[tuple[int, Statistics], Tensor]]:
    """`evaluate_at` by each of several metrics, by name.

    tell: receives the number of tasks with outputs, losses or scores that are no numbers. times: how many evaluations
        like this one are to come, for the rule of compile="auto".
    """
    check_compile(compile)
    ranks = as_ranks(group)
    points = sorted(dict.fromkeys(points), key=lambda point: point[0])
    with ranks.agreeing(), ranks.computing():
        tasks, at_once = whole("tasks", tasks, 1), whole("tasks_at_once", tasks_at_once, 1)
        check_width(learner, episodes)
        at_once = max(1, at_once // copies_of(episodes))
        pieces = ranks.portions(tasks, at_once)
        plan: Plan | None = None
        compiled = False
        scores = torch.zeros(len(metrics), len(points), tasks, dtype=torch.float64)
        spoiled, silent = torch.zeros(tasks, dtype=torch.float64), False
        portions = Portions(at_once)

        def score(part: range) -> tuple[Tensor, Tensor]:
            nonlocal plan, compiled
            batch = batch_of(episodes, part.start, len(part), learner.model)
            check_labels(learner, batch)
            if plan is None:
                first = batch if group is None else batch_of(episodes, 0, len(pieces[0]), learner.model)
                plan = make_plan(learner, first, engine=engine)
                compiled = compiles(compile, learner, first, times * tasks, points)
            with ranks.drawing(EVALUATED, index, 0) if group is not None else nullcontext():
                found, bad = _scored(
                    plan, batch, points, metrics, episodes, balanced, compiled, compile == "auto"
                )
            if bad.any() and not spoiled.any():
                check_finite_tasks(batch)
            return found, bad.cpu()

        for index in ranks.share(len(pieces)):
            for part, (found, bad) in portions(pieces[index], score):
                scores[:, :, part.start : part.stop] = found
                spoiled[part.start : part.stop] = bad.double()
                # a score that is no number speaks for itself
                silent = silent or bool((bad & found.isfinite().all(0).all(0)).any())
    sums = torch.cat([scores.flatten(), spoiled, torch.tensor([float(silent)], dtype=torch.float64)])
    told = ranks.sum(sums)
    number = int(told[scores.numel() : -1].sum())
    tell(number)
    if told[-1]:
        which = f"outputs or losses of {number} of {tasks} tasks"
        text = f"{which} are no numbers, and count as wrong: try a smaller inner_lr"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    scores = told[: scores.numel()].reshape(scores.shape)
    return {metric.name: dict(zip(points, own)) for metric, own in zip(metrics, scores)}


def _scored(
    plan: Plan,
    batch: Batch,
    points: Sequence[tuple[int, Statistics]],
    metrics: Sequence[Metric],
    episodes: TaskSequence,
    balanced: bool,
    compile: bool = False,
    quietly: bool = True,
) -> tuple[Tensor, Tensor]:
    """(metrics, points, tasks) scores, and (tasks,) whether outputs, losses or scores hold what is no number."""
    targets = query_targets(batch)
    curves: dict[Any, list] = {}
    found = []
    bad = torch.zeros(count(batch), dtype=torch.bool, device=device_of(batch))
    for metric in metrics:
        kind = measured_for(plan.learner, metric)
        if kind not in curves:
            curves[kind] = plan.curve(batch, points, kind, ways_of_each(episodes), compile, quietly)
        for losses, outputs in curves[kind]:
            own = judged(episodes, metric, outputs, targets, losses, balanced)
            bad |= _without_numbers((losses, outputs, own), bad)
            found.append(exact(own))
    return torch.stack(found).unflatten(0, (len(metrics), len(points))), bad


def _without_numbers(found: tuple[Tensor, Tree, Tensor], like: Tensor) -> Tensor:
    """(tasks,) bool: which tasks have a nan among losses (tasks,), outputs and scores (tasks,).

    Outputs are tensors (tasks, ...), or of a list of tasks as many trees.
    """
    losses, outputs, scores = found
    bad = losses.isnan().to(like.device) | scores.isnan().to(like.device)
    if isinstance(outputs, list) and len(outputs) == len(like):
        each = [any(leaf.isnan().any() for leaf in leaves(own)) for own in outputs]
        return bad | torch.tensor(each, device=like.device)
    for leaf in leaves(outputs):
        bad = bad | leaf.isnan().reshape(len(like), -1).any(1).to(like.device)
    return bad


def balance(outputs: Tensor, targets: Tensor) -> Tensor:
    """(tasks, examples, ways) log-probabilities, of logits, given that each class occurs equally often in a task.

    Rows and columns of the probabilities are scaled in turn to equal sums (Sinkhorn and Knopp 1967; on query sets:
    Hu, Gripon and Pateux 2021, PT-MAP). So an example that fits two classes goes where one is missing. Query sets of
    benchmarks are balanced, those of an application seldom (Veilleux et al. 2021).

    targets: (tasks, examples) labels from 0. They serve to check that the tasks are balanced.

    Raises:
        InputError: targets that are no labels, or classes that do not occur equally often.
    """
    if targets.is_floating_point() or outputs.dim() != 3 or targets.dim() != 2:
        raise InputError("balanced needs one label for each example, got targets of another kind")
    if targets.min() < 0:
        raise InputError(
            f"balanced needs a label for each example, got ones that are ignored, {targets.min()}"
        )
    ways = int(targets.max()) + 1
    counts = F.one_hot(targets, ways).sum(1)
    if counts.min() != counts.max():
        raise InputError(
            f"balanced needs the same number of query examples per class, got {counts.min()} to {counts.max()}"
        )
    assigned = outputs[..., :ways].to(torch.promote_types(outputs.dtype, torch.float32))
    for _ in range(SCALINGS):
        assigned = assigned.log_softmax(1).log_softmax(2)
    return assigned


def judged(
    episodes: TaskSequence,
    metric: Metric,
    outputs: Tree,
    targets: Tree,
    losses: Tensor | None = None,
    balanced: bool = False,
) -> Tensor:
    """`scores`, of outputs that are averaged over the copies of a query image, and balanced if asked for."""
    copies = copies_of(episodes)
    if (copies > 1 or balanced) and not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        raise InputError(
            "copies and balanced change one tensor of outputs, of tasks of one shape: leave them out"
        )
    if copies > 1:
        outputs, targets = outputs.unflatten(1, (-1, copies)).mean(2), targets[:, ::copies]
    if balanced:
        outputs = balance(outputs, targets)
        if metric is LOSS:
            raise InputError(
                "balanced changes outputs, which the loss was computed of before: take another metric"
            )
    return scores(metric, outputs, targets, losses)


def batches(episodes: TaskSequence, tasks: int, tasks_at_once: int, model: nn.Module) -> Iterator[Batch]:
    """So many tasks, so many at once, where they fit into memory. model: see `as_batch`."""
    tasks, tasks_at_once = whole("tasks", tasks, 1), whole("tasks_at_once", tasks_at_once, 1)
    drawn = Portions(tasks_at_once)(
        range(tasks), lambda part: batch_of(episodes, part.start, len(part), model)
    )
    for _, batch in drawn:
        yield batch
