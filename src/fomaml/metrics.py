"""What a score is: its name, how it is computed, which direction is better, and how it is written."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.errors import InputError
from fomaml.tasks import Examples, first
from fomaml.trees import Tree, mapped


class Metric(NamedTuple):
    """A score of each task.

    score: (outputs, targets, losses) of query sets → (tasks,). outputs (tasks, examples, ...), targets
        (tasks, examples, ...), losses (tasks,) or None where there is no loss. `of_each_task` makes one of a function
        of one task.
    direction: 1 if higher is better, -1 if lower is.
    unit: "%" for a score from 0 to 1 that is written in per cent, or "".
    """

    name: str
    score: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    direction: Literal[1, -1]
    unit: Literal["%", ""]

    @property
    def scale(self) -> int:
        """The factor from a score to what is written in the unit."""
        return 100 if self.unit == "%" else 1

    def text(self, mean: float, interval: float, digits: int | None = None) -> str:
        """A mean and its interval, the unit left out: "85.3 ± 0.6" in per cent, else plain numbers, "0.123 ± 0.004"."""
        digits = (1 if self.unit == "%" else 3) if digits is None else digits
        return f"{self.scale * mean:.{digits}f} ± {self.scale * interval:.{digits}f}"


# (outputs, targets) of the query set of one task, (examples, ...) each → its score
OfTask = Callable[[Tensor, Tensor], Tensor | float]
Asked = str | Metric | OfTask | None  # see `metric_for`

# --- the scores -----------------------------------------------------------------------------------

IGNORED = -100  # the label that torch's cross-entropies leave out by default


def accuracy(
    outputs: Tensor, targets: Tensor, losses: Tensor | None = None, ignored: int = IGNORED
) -> Tensor:
    """(tasks,) float64 shares of the labels that are the class of the largest output.

    Axes are those of `F.cross_entropy`, of a stack of tasks. outputs: (tasks, examples, classes, ...). targets: labels
    (tasks, examples, ...), or floating probabilities of the outputs' shape, whose largest is the label.
    ignored: the label of what is left out.

    Raises:
        InputError: other shapes, or a task all of whose labels are left out.
    """
    if outputs.dim() > 2 and targets.is_floating_point() and targets.shape == outputs.shape:
        return (outputs.argmax(2) == targets.argmax(2)).double().flatten(1).mean(1)
    if targets.is_floating_point() or outputs.shape[:2] + outputs.shape[3:] != targets.shape:
        raise InputError(
            "accuracy needs outputs (examples, classes, ...) and labels (examples, ...), or probabilities of the "
            f"outputs' shape, got outputs {tuple(outputs.shape[1:])} and {targets.dtype} targets "
            f"{tuple(targets.shape[1:])}: take another metric"
        )
    check_ignored("query", targets, ignored)
    targets = targets.long()  # to compare bytes with -100 would be to compare them with 156
    counted = (targets != ignored).flatten(1)
    right = (outputs.argmax(2) == targets).flatten(1) & counted
    return right.sum(1).double() / counted.sum(1)


def loss(outputs: Tensor, targets: Tensor, losses: Tensor | None) -> Tensor:
    """(tasks,) the losses as they are.

    Raises:
        InputError: there are none, as of outputs that no criterion has judged.
    """
    if losses is None:
        raise InputError("there is no loss here to score by: take 'accuracy', or a function as the metric")
    return losses


ACCURACY = Metric("accuracy", accuracy, 1, "%")
LOSS = Metric("loss", loss, -1, "")
OF_TENSORS = (accuracy,)
METRICS = {metric.name: metric for metric in (ACCURACY, LOSS)}


def of_each_task(function: OfTask) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The `score` of a `Metric` out of a function of one task.

    function: (outputs (examples, ...), targets (examples, ...)) of a query set → one number. It is called task by task
        without gradients. Outputs of -inf that stand for classes which a task lacks beside others are cut off first.

    Raises:
        InputError: when it returns something else.
    """

    @torch.no_grad()
    def score(outputs: Tree, targets: Tree, losses: Tensor | None = None) -> Tensor:
        number = len(first(outputs))
        each = _own_classes(outputs) if isinstance(outputs, Tensor) else _apart(outputs, number)
        pairs = zip(each, _apart(targets, number), strict=True)
        found = [_number(function(*own), function) for own in pairs]
        return torch.tensor(found, dtype=torch.float64, device=first(outputs).device)

    return score


class OfModel:
    """The `score` of a `Metric` that judges the model itself, out of a function of one task.

    function: (forward, examples) → one number, of the model at φ and of the query set, as a `loss` of `MetaLearner`
        gets them; it may differentiate. It is called task by task.
    """

    def __init__(self, function: Callable[[Callable, Examples], Any]):
        self.function = function

    def measure(self, forward: Callable, examples: Examples) -> Tensor:
        """() float64, the value of one task."""
        value = _number(self.function(forward, examples), self.function)
        return torch.tensor(value, dtype=torch.float64, device=first(examples.inputs).device)

    def __call__(self, outputs: Tensor, targets: Tree, losses: Tensor | None) -> Tensor:
        """(tasks,) what was measured, which stands in the place of outputs."""
        return outputs


def scores(metric: Metric, outputs: Tree, targets: Tree, losses: Tensor | None) -> Tensor:
    """(tasks,) the scores of query sets.

    outputs, targets: (tasks, examples, ...), or lists of those of each task, (examples, ...).

    Raises:
        InputError: the metric gives something else, or is of tensors where there are several or none.
    """
    if isinstance(targets, list):
        alone = [mapped(lambda tensor: tensor[None], pair) for pair in zip(outputs, targets)]
        rows = range(len(targets))
        own_losses = [None if losses is None else losses[row : row + 1] for row in rows]
        return torch.cat([scores(metric, o, t, own) for (o, t), own in zip(alone, own_losses)])
    named = metric.score in OF_TENSORS
    if named and not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        raise InputError(
            f"{metric.name} is of one tensor of outputs and one of targets: give output=, which says what of the "
            "model's is judged, or a function as the metric"
        )
    number = len(first(outputs)) if losses is None else len(losses)
    found = metric.score(outputs, targets, losses)
    if not isinstance(found, Tensor) or found.shape != (number,):
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else _kind(found)
        raise InputError(
            f"the score of the metric {metric.name!r} is {what}, expected {number} scores, one for each task: "
            "fomaml.metrics.of_each_task makes it of a function of one task"
        )
    return found


def _apart(tree: Tree, number: int) -> list[Tree]:
    """Of each task."""
    return [mapped(lambda tensor, row=row: tensor[row], tree) for row in range(number)]


def _number(found: Any, function: Callable) -> float:
    is_number = isinstance(found, numbers.Real | np.bool_)
    if not is_number and not (isinstance(found, Tensor) and not found.dim() and not found.is_complex()):
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else _kind(found)
        raise InputError(f"the metric {_name(function)!r} returns {what}, expected one number for each task")
    return float(found.detach() if isinstance(found, Tensor) else found)


def _own_classes(outputs: Tensor) -> list[Tensor]:
    """The outputs of each task, without classes that it lacks beside tasks that have more: all of its examples have
    -inf there, as `MetaGradient` says.
    """
    if outputs.dim() < 3 or not outputs.is_floating_point():
        return list(outputs)
    lacking = (outputs.movedim(2, 1).flatten(2) == -math.inf).all(2)  # (tasks, classes)
    if not lacking[:, -1].any() or lacking[:, -1].all():
        return list(outputs)
    widths = [int((~row).nonzero()[-1]) + 1 if not row.all() else len(row) for row in lacking]
    return [own[:, :width] for own, width in zip(outputs, widths)]


# --- which one ------------------------------------------------------------------------------------


def ignored_label(criterion: Any) -> int | None:
    """The label that a criterion ignores if it is a cross-entropy; None if it is another, or cannot be known.

    Known are `F.cross_entropy`, `F.nll_loss`, their modules and `functools.partial` of all these.
    """
    options: dict[str, Any] = {}
    while isinstance(criterion, functools.partial) and not criterion.args:
        options = criterion.keywords | options
        criterion = criterion.func
    if criterion is F.cross_entropy or criterion is F.nll_loss:
        return options.get("ignore_index", IGNORED)
    for kind in (nn.CrossEntropyLoss, nn.NLLLoss):
        # a subclass that computes something else is another criterion
        if isinstance(criterion, kind) and type(criterion).forward is kind.forward:
            return criterion.ignore_index
    return None


def check_ignored(part: str, targets: Tensor, ignored: int) -> None:
    """Raise `InputError` where all labels of a task are left out, so that nothing can be learned from it, or judged.

    part: "support" or "query". targets: (tasks, examples, ...).
    """
    if not targets.is_floating_point() and (targets.long() == ignored).flatten(1).all(1).any():
        raise InputError(
            f"all {part} labels of a task are {ignored}, which is ignored: a task needs others as well"
        )


def metric_for(criterion: Any, asked: Asked = None) -> Metric:
    """The metric that is asked for; by default the accuracy where the criterion is a cross-entropy, else the loss.

    asked: a name in METRICS, a `Metric`, or a function of one task, see `of_each_task`, of which more is better.
        The accuracy leaves out the labels that the criterion ignores.

    Raises:
        InputError: an unknown name, or something else.
    """
    ignored = ignored_label(criterion)
    if asked is None:
        asked = LOSS if ignored is None else ACCURACY
    if isinstance(asked, str):
        if asked not in METRICS:
            raise InputError(
                f"unknown metric {asked!r}; there are: {', '.join(METRICS)}, or a function of outputs and targets"
            )
        asked = METRICS[asked]
    if asked is ACCURACY:
        if ignored is None:
            return ACCURACY._replace(score=_accuracy_of_distributions)
        return asked if ignored == IGNORED else asked._replace(score=_accuracy_without(ignored))
    if isinstance(asked, Metric):
        return _checked(asked)
    if isinstance(asked, type) or not callable(asked):
        raise InputError(
            f"a metric is a name, a Metric or a function of outputs and targets, got {_kind(asked)}"
        )
    return Metric(_name(asked), of_each_task(asked), 1, "")


def _accuracy_without(ignored: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return functools.partial(accuracy, ignored=ignored)


def _accuracy_of_distributions(outputs: Tensor, targets: Tensor, losses: Tensor | None = None) -> Tensor:
    """`accuracy` where no cross-entropy vouches that floating targets are probabilities of classes."""
    if targets.is_floating_point() and targets.dim() > 2:
        sums = targets.sum(2)
        if targets.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
            raise InputError(
                "accuracy needs labels, or probabilities that sum to 1 over axis 1 of a task, got other floating "
                "targets: take another metric"
            )
    return accuracy(outputs, targets, losses)


def _checked(metric: Metric) -> Metric:
    """The metric.

    Raises:
        InputError: a field that is not what it must be.
    """
    if metric.direction not in (1, -1) or metric.unit not in ("%", ""):
        raise InputError(
            f"the metric {metric.name!r} needs direction 1 or -1 and unit '%' or '', got {metric.direction!r} and "
            f"{metric.unit!r}"
        )
    if not callable(metric.score) or not _takes_losses(metric.score):
        raise InputError(
            f"the score of the metric {metric.name!r} takes (outputs, targets, losses) of all tasks: "
            "fomaml.metrics.of_each_task makes it of a function of one task"
        )
    return metric


def _takes_losses(score: Callable) -> bool:
    """Whether its third argument is for the losses, and no option as of the functions of torch."""
    signature = inspect.signature(score)
    try:
        signature.bind(None, None, None)
    except TypeError:
        return False
    positional = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    if len(positional) < 3:  # *arguments
        return True
    return positional[2].default is inspect.Parameter.empty or positional[2].name == "losses"


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
