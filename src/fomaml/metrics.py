"""What a score is: its name, how it is computed, which direction is better, and how it is written."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml import measures
from fomaml.errors import InputError, in_one_line, positive
from fomaml.measures import IGNORED, ByClass, accuracy, own_classes
from fomaml.measures import check_ignored as check_ignored
from fomaml.tasks import Examples, first
from fomaml.trees import Tree, mapped


class Metric(NamedTuple):
    """A score of each task.

    score: (outputs, targets, losses) of query sets → (tasks,). outputs (tasks, examples, ...), targets
        (tasks, examples, ...), losses (tasks,) or None where there is no loss. `of_each_task` makes one of a function
        of one task.
    direction: 1 if higher is better, -1 if lower is.
    unit: "%" for a score from 0 to 1 that is written in per cent, "dB" of a ratio, or "".
    """

    name: str
    score: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    direction: Literal[1, -1]
    unit: Literal["%", "dB", ""]

    @property
    def scale(self) -> int:
        """The factor from a score to what is written in the unit."""
        return 100 if self.unit == "%" else 1

    def text(self, mean: float, interval: float, digits: int | None = None) -> str:
        """A mean and its interval, the unit left out: "85.3 ± 0.6" in per cent or dB, else "0.123 ± 0.004".

        One value alone has no interval, and none is told.
        """
        digits = (3 if self.unit == "" else 1) if digits is None else digits
        spread = "" if math.isnan(interval) else f" ± {self.scale * interval:.{digits}f}"
        return f"{self.scale * mean:.{digits}f}{spread}"


# (outputs, targets) of the query set of one task, (examples, ...) each → its score
OfTask = Callable[[Tensor, Tensor], Tensor | float]
Asked = str | Metric | OfTask | None  # see `metric_for`

# --- the scores -----------------------------------------------------------------------------------


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
PSNR = Metric("psnr", measures.psnr, 1, "dB")
OF_CLASSES = (  # by scikit-learn
    Metric("balanced-accuracy", ByClass("balanced-accuracy"), 1, "%"),
    Metric("f1", ByClass("f1"), 1, "%"),
    Metric("auprc", ByClass("auprc"), 1, "%"),
)
OF_NUMBERS = (
    Metric("mse", measures.mse, -1, ""),
    Metric("rmse", measures.rmse, -1, ""),
    Metric("mae", measures.mae, -1, ""),
    Metric("r2", measures.r2, 1, ""),  # by scikit-learn
    PSNR,
)
METRICS = {metric.name: metric for metric in (ACCURACY, LOSS, *OF_CLASSES, *OF_NUMBERS)}


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
        each = own_classes(outputs) if isinstance(outputs, Tensor) else _apart(outputs, number)
        pairs = zip(each, _apart(targets, number), strict=True)
        # copies: what it writes into them stays out of the next metric, and of the task
        found = [_number(function(*mapped(torch.clone, own)), function) for own in pairs]
        return torch.tensor(found, dtype=torch.float64)

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
        try:
            found = self.function(forward, examples)
        except (AttributeError, TypeError, IndexError) as error:
            raise InputError(
                f"the metric {name_of(self.function)!r} fails ({in_one_line(error)}): of a learner with a loss= it is "
                "called with (forward, examples), as the loss is"
            ) from error
        value = _number(found.detach() if isinstance(found, Tensor) else found, self.function)
        return torch.tensor(value, dtype=torch.float64)

    def __call__(self, outputs: Tensor, targets: Tree, losses: Tensor | None) -> Tensor:
        """(tasks,) what was measured, which stands in the place of outputs."""
        return outputs


def scores(metric: Metric, outputs: Tree, targets: Tree, losses: Tensor | None) -> Tensor:
    """(tasks,) the scores of query sets, on the CPU.

    outputs, targets: (tasks, examples, ...), or lists of those of each task, (examples, ...).

    Raises:
        InputError: the metric gives something else, or is of tensors where there are several or none.
    """
    if isinstance(targets, list):
        alone = [mapped(lambda tensor: tensor[None], pair) for pair in zip(outputs, targets)]
        rows = range(len(targets))
        own_losses = [None if losses is None else losses[row : row + 1] for row in rows]
        return torch.cat([scores(metric, o, t, own) for (o, t), own in zip(alone, own_losses)])
    if _of_tensors(metric) and not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
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
    return found.cpu()


def _of_tensors(metric: Metric) -> bool:
    """Whether it is one of `measures`, which are of one tensor of outputs and one of targets."""
    score = metric.score.func if isinstance(metric.score, functools.partial) else metric.score
    return isinstance(score, ByClass) or getattr(score, "__module__", "") == measures.__name__


def _apart(tree: Tree, number: int) -> list[Tree]:
    """Of each task."""
    return [mapped(lambda tensor, row=row: tensor[row], tree) for row in range(number)]


def _number(found: Any, function: Callable) -> float:
    is_number = isinstance(found, numbers.Real | np.bool_)
    if not is_number and not (isinstance(found, Tensor) and not found.dim() and not found.is_complex()):
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else _kind(found)
        raise InputError(
            f"the metric {name_of(function)!r} returns {what}, expected one number for each task"
        )
    return float(found.detach() if isinstance(found, Tensor) else found)


# --- which one ------------------------------------------------------------------------------------


def ignored_label(criterion: Any) -> int | None:
    """The label that a criterion ignores if it is a cross-entropy; None if it is another, or cannot be known.

    Known are `F.cross_entropy`, `F.nll_loss`, their modules and `functools.partial` of all these.
    """
    criterion, options = with_options(criterion)
    if criterion is F.cross_entropy or criterion is F.nll_loss:
        return options.get("ignore_index", IGNORED)
    for kind in (nn.CrossEntropyLoss, nn.NLLLoss):
        if _computes_as(criterion, kind):
            return criterion.ignore_index
    return None


def threshold_of(criterion: Any) -> float | None:
    """The output above which a binary cross-entropy says class 1; None of another criterion."""
    criterion, _ = with_options(criterion)
    if criterion is F.binary_cross_entropy_with_logits or _computes_as(criterion, nn.BCEWithLogitsLoss):
        return 0.0
    if criterion is F.binary_cross_entropy or _computes_as(criterion, nn.BCELoss):
        return 0.5
    return None


def with_options(criterion: Any) -> tuple[Any, dict[str, Any]]:
    """A criterion within `functools.partial`, and the options that these give it."""
    options: dict[str, Any] = {}
    while isinstance(criterion, functools.partial) and not criterion.args:
        options = criterion.keywords | options
        criterion = criterion.func
    return criterion, options


def _computes_as(criterion: Any, kind: type[nn.Module]) -> bool:
    """Whether it is of this kind: a subclass that computes something else is another criterion."""
    return isinstance(criterion, kind) and type(criterion).forward is kind.forward


def named(name: str) -> Metric:
    """The metric of this name in METRICS, "_" for "-" too; "psnr:2" is `psnr` of a range of 2, as of [-1, 1].

    Raises:
        InputError: there is none, or a library that it needs is not installed.
    """
    plain, _, data_range = name.partition(":")
    plain = plain if plain in METRICS else plain.replace("_", "-").lower()
    if plain not in METRICS or (data_range and plain != "psnr"):
        raise InputError(
            f"unknown metric {name!r}; there are: {', '.join(METRICS)}, or a function of outputs and targets"
        )
    metric = METRICS[plain]
    if metric.score is measures.r2 or isinstance(metric.score, ByClass):
        measures.sklearn(plain)  # now, not after an hour of training
    if data_range:
        try:
            number = float(data_range)
        except ValueError:
            raise InputError(f"the range of psnr is a number, as in psnr:2, got {data_range!r}") from None
        number = positive("the range of psnr", number)
        metric = PSNR._replace(name=name, score=functools.partial(measures.psnr, data_range=number))
    return metric


def metric_for(criterion: Any, asked: Asked = None) -> Metric:
    """The metric that is asked for; by default the accuracy where the criterion is a cross-entropy, else the loss.

    asked: a name, see `named`, a `Metric`, or a function of one task, see `of_each_task`, of which more is better.
        Metrics of classes leave out the labels that the criterion ignores, and take one output for each label as a
        binary cross-entropy reads it.

    Raises:
        InputError: an unknown name, or something else.
    """
    ignored = ignored_label(criterion)
    if asked is None:
        asked = LOSS if ignored is None else ACCURACY
    if isinstance(asked, str):
        asked = named(asked)
    if asked is ACCURACY:
        if ignored == IGNORED:
            return asked
        asked = asked._replace(score=ByClass("accuracy"))
    if isinstance(asked, Metric):
        if isinstance(asked.score, ByClass):
            of = replace(
                asked.score,
                ignored=IGNORED if ignored is None else ignored,
                certain=ignored is not None,
                threshold=threshold_of(criterion),
            )
            asked = asked._replace(score=of)
        return _checked(asked)
    if isinstance(asked, type) or not callable(asked):
        raise InputError(
            f"a metric is a name, a Metric or a function of outputs and targets, got {_kind(asked)}"
        )
    return Metric(name_of(asked), of_each_task(asked), 1, "")


def metrics_for(criterion: Any, asked: Asked | Sequence[Asked] = None) -> list[Metric]:
    """Several metrics, each as of `metric_for`; one alone, or None, is a list of one.

    Raises:
        InputError: none, or two of one name.
    """
    if isinstance(asked, Metric) or not isinstance(asked, list | tuple):  # a Metric is a tuple
        return [metric_for(criterion, cast(Asked, asked))]
    metrics = [metric_for(criterion, each) for each in asked]
    if not metrics:
        raise InputError("no metric is asked for; leave metric out for the default, or name one")
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"two metrics are named {name!r}; leave one out, or give a fomaml.Metric with another name"
            )
    return metrics


def as_asked(asked: Asked | list[Asked], found: Mapping[str, Tensor]) -> Any:
    """Scores by name as they are returned: of a list of metrics by name, of one alone its own."""
    if isinstance(asked, list):
        return dict(found)
    [alone] = found.values()
    return alone


def _checked(metric: Metric) -> Metric:
    """The metric.

    Raises:
        InputError: a field that is not what it must be.
    """
    if metric.direction not in (1, -1) or metric.unit not in ("%", "dB", ""):
        raise InputError(
            f"the metric {metric.name!r} needs direction 1 or -1 and unit '%', 'dB' or '', got "
            f"{metric.direction!r} and {metric.unit!r}"
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


def name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
