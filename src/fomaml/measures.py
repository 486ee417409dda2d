"""What the named metrics compute: a score of each task out of the outputs and targets of its query set."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fomaml.errors import InputError

# --- of classes -----------------------------------------------------------------------------------

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
    targets = labels_of("accuracy", outputs, targets, ignored)
    counted = (targets != ignored).flatten(1)
    right = (outputs.argmax(2) == targets).flatten(1) & counted
    return exact(right.sum(1)) / exact(counted.sum(1))


def labels_of(name: str, outputs: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """(tasks, examples, ...) int64 labels of outputs (tasks, examples, classes, ...).

    name: of the metric that needs them, for the message.
    """
    if outputs.dim() > 2 and targets.is_floating_point() and targets.shape == outputs.shape:
        return targets.argmax(2)
    if targets.is_floating_point() or outputs.shape[:2] + outputs.shape[3:] != targets.shape:
        raise InputError(
            f"{name} needs outputs (examples, classes, ...) and labels (examples, ...), or probabilities of the "
            f"outputs' shape, got outputs {tuple(outputs.shape[1:])} and {targets.dtype} targets "
            f"{tuple(targets.shape[1:])}: take another metric"
        )
    check_ignored("query", targets, ignored)
    return targets.long()  # to compare bytes with -100 would be to compare them with 156


def check_ignored(part: str, targets: Tensor, ignored: int) -> None:
    """Raise `InputError` where all labels of a task are left out, so that nothing can be learned from it, or judged.

    part: "support" or "query". targets: (tasks, examples, ...).
    """
    if not targets.is_floating_point() and (targets.long() == ignored).flatten(1).all(1).any():
        raise InputError(
            f"all {part} labels of a task are {ignored}, which is ignored: a task needs others as well"
        )


def check_distributions(name: str, targets: Tensor) -> None:
    """Raise `InputError` of floating targets that are no probabilities, where no cross-entropy vouches for them."""
    if targets.is_floating_point() and targets.dim() > 2:
        sums = targets.sum(2)
        if targets.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
            raise InputError(
                f"{name} needs labels, or probabilities that sum to 1 over axis 1 of a task, got other floating "
                "targets: take another metric"
            )


def one_output(outputs: Tensor, targets: Tensor) -> bool:
    """Whether there is one output for each label, of two classes: no class axis, or one of size 1."""
    if outputs.dim() == 2:
        return targets.shape == outputs.shape
    return outputs.shape[2] == 1 and targets.shape in (outputs.shape, outputs.squeeze(2).shape)


def binary(name: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(tasks, numbers) outputs, and int64 labels 0 or 1, of one output for each label."""
    if not ((targets == 0) | (targets == 1)).all():
        raise InputError(
            f"{name} of one output for each example needs targets of 0 and 1, got others, as "
            f"{targets[(targets != 0) & (targets != 1)][0].item():g}: take a metric of numbers, such as mse"
        )
    return outputs.flatten(1), targets.flatten(1).long()


@dataclass(frozen=True)
class ByClass:
    """A score of labels, by scikit-learn where it knows it: `Metric.score` of the metrics of classes.

    Axes are those of `F.cross_entropy`, as of `accuracy`; or one output for each label, (examples,) or
    (examples, 1, ...), with targets 0 and 1, as of a binary cross-entropy.

    ignored: the label that is left out.
    certain: whether the criterion vouches that floating targets of the outputs' shape are probabilities of classes.
    threshold: the output above which one output says class 1; None where the criterion does not say it.
    """

    name: Literal["accuracy", "balanced-accuracy", "f1", "auprc"]
    ignored: int = IGNORED
    certain: bool = False
    threshold: float | None = None

    def __call__(self, outputs: Tensor, targets: Tensor, losses: Tensor | None = None) -> Tensor:
        single = one_output(outputs, targets)
        if not single and not self.certain:
            check_distributions(self.name, targets)
        if not single and self.name == "accuracy":
            return accuracy(outputs, targets, losses, self.ignored)
        if single:
            rows, labels = binary(self.name, outputs, targets)
            tasks = list(zip(rows, labels))
        else:
            labels = labels_of(self.name, outputs, targets, self.ignored)
            counted = [truth != self.ignored for truth in labels]
            classes_last = (own.movedim(1, -1) for own in own_classes(outputs))
            tasks = [(own[which], truth[which]) for own, truth, which in zip(classes_last, labels, counted)]
        return _of_tasks(self._score, tasks)

    def _score(self, outputs: Tensor, labels: Tensor) -> float:
        """outputs: (labels,) or (labels, classes) of one task."""
        if outputs.isnan().any():
            return math.nan
        if self.name == "auprc":
            return auprc(outputs, labels)
        predicted = outputs.argmax(1) if outputs.dim() == 2 else (outputs > self._threshold()).long()
        if self.name == "accuracy":
            return exact(predicted == labels).mean().item()
        pair = labels.cpu().numpy(), predicted.cpu().numpy()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "y_pred contains classes not in y_true"
            )  # they are wrong, no more
            if self.name == "balanced-accuracy":
                return sklearn(self.name).balanced_accuracy_score(*pair)
            return sklearn(self.name).f1_score(*pair, average="macro")

    def _threshold(self) -> float:
        if self.threshold is None:
            raise InputError(
                f"{self.name} of one output for each example needs a threshold between the two classes, which "
                "F.binary_cross_entropy_with_logits and F.binary_cross_entropy say and this criterion does not: "
                "take auprc, or a function of outputs and targets"
            )
        return self.threshold


def auprc(outputs: Tensor, labels: Tensor) -> float:
    """The area under the curve of precision over recall, as scikit-learn's `average_precision_score`.

    outputs: (labels,) the larger, the rather class 1; or (labels, classes), of two classes that of class 1, of more the
    mean over the classes that occur, each against all others by its probability (softmax).

    Raises:
        InputError: labels of one class alone.
    """
    found = labels.unique().tolist()
    if len(found) < 2:
        raise InputError(
            f"auprc needs query examples of two classes or more in each task, got a task with class {found[0]} alone: "
            "leave it out, or take another metric"
        )
    precision = sklearn("auprc").average_precision_score
    if outputs.dim() == 1 or outputs.shape[1] == 2:
        found = [1]
    areas = [precision((labels == c).cpu().numpy(), _odds(outputs, c).cpu().numpy()) for c in found]
    return float(sum(areas) / len(areas))


def _odds(outputs: Tensor, number: int) -> Tensor:
    """(labels,) float64 log odds of a class: in the order of its probability, but two that round to 1 are no tie."""
    outputs = exact(outputs)
    if outputs.dim() == 2:
        rest = torch.cat([outputs[:, :number], outputs[:, number + 1 :]], dim=1)
        # rounding alone is not to break ties, of which forests of trees have many
        outputs = (outputs[:, number] - rest.logsumexp(1)).round(decimals=10)
    return outputs.nan_to_num()  # scikit-learn refuses infinities


def own_classes(outputs: Tensor) -> list[Tensor]:
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


# --- of numbers -----------------------------------------------------------------------------------


def mse(outputs: Tensor, targets: Tensor, losses: Tensor | None = None) -> Tensor:
    """(tasks,) float64 mean squared errors over all numbers of a query set.

    This and the next ones are one line of torch each: to have scikit-learn compute them would be a library to install.
    """
    return _errors("mse", outputs, targets).square().flatten(1).mean(1)


def rmse(outputs: Tensor, targets: Tensor, losses: Tensor | None = None) -> Tensor:
    """(tasks,) float64 root mean squared errors; of several targets the mean of each one's, as scikit-learn's."""
    return _columns(_errors("rmse", outputs, targets)).square().mean(1).sqrt().mean(1)


def mae(outputs: Tensor, targets: Tensor, losses: Tensor | None = None) -> Tensor:
    """(tasks,) float64 mean absolute errors over all numbers of a query set."""
    return _errors("mae", outputs, targets).abs().flatten(1).mean(1)


def r2(outputs: Tensor, targets: Tensor, losses: Tensor | None = None) -> Tensor:
    """(tasks,) R², the share of the targets' variance that is explained; of several targets the mean of each one's.

    Raises:
        InputError: targets that do not vary over a query set, as those of one example: there is nothing to explain.
    """
    check_numbers("r2", outputs, targets)
    outputs, targets = _columns(outputs), _columns(targets)
    constant = (targets == targets[:, :1]).all(1).any(1)
    if constant.any():
        raise InputError(
            f"r2 needs query targets that differ within each task, got {int(constant.sum())} of {len(constant)} tasks "
            f"where one is the same in all {targets.shape[1]} examples: take rmse or mae, or more query examples"
        )

    def score(own: Tensor, truth: Tensor) -> float:
        if own.isnan().any():
            return math.nan
        return sklearn("r2").r2_score(exact(truth).numpy(), exact(own).numpy())

    return _of_tasks(score, list(zip(outputs, targets)))


def psnr(outputs: Tensor, targets: Tensor, losses: Tensor | None = None, data_range: float = 1.0) -> Tensor:
    """(tasks,) float64 peak signal-to-noise ratios in dB, 10 log₁₀(data_range² / MSE); infinite without an error.

    data_range: the largest less the smallest value that a target may have: 1 of [0, 1], 2 of [-1, 1], 255 of bytes.
    """
    check_numbers("psnr", outputs, targets)
    return 10 * torch.log10(data_range**2 / mse(outputs, targets))


def check_numbers(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Raise `InputError` of what is not one floating target for each output."""
    if not targets.is_floating_point() or outputs.is_complex() or outputs.shape != targets.shape:
        raise InputError(
            f"{name} needs floating targets of the outputs' shape, got outputs {tuple(outputs.shape[1:])} and "
            f"{targets.dtype} targets {tuple(targets.shape[1:])}: of labels take accuracy"
        )


def _errors(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    check_numbers(name, outputs, targets)
    return exact(outputs) - exact(targets)


def _columns(numbers: Tensor) -> Tensor:
    """(tasks, examples, targets)."""
    return numbers.reshape(*numbers.shape[:2], -1)


# --- all ------------------------------------------------------------------------------------------


def exact(values: Tensor) -> Tensor:
    """In float64 on the CPU, as all scores are: not every device has float64, Apple's has not."""
    return values.cpu().double()


def sklearn(name: str) -> Any:
    """`sklearn.metrics`, for the metric of this name.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("sklearn.metrics")
    except ImportError:
        raise InputError(f"the metric {name!r} needs scikit-learn: pip install 'fomaml[metrics]'") from None


@torch.no_grad()
def _of_tasks(score: Callable[[Tensor, Tensor], float], tasks: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.tensor([float(score(*task)) for task in tasks], dtype=torch.float64)
