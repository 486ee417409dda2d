"""What a model or a criterion returns, and would mean nothing: seen before anything is computed from it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.errors import InputError
from fomaml.learning.contracts import Criterion, unwrapped
from fomaml.metrics import ignored_label


def checked_outputs(outputs: Any) -> Tensor:
    """What a model returns.

    Raises:
        InputError: it is not one tensor.
    """
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"the model returns a {type(outputs).__name__}, expected one tensor of outputs: wrap it in a module that "
            "returns the one that the criterion judges"
        )
    return outputs


def checked_loss(loss: Any) -> Tensor:
    """What a criterion returns.

    Raises:
        InputError: it is not one number, as with `reduction="none"`.
    """
    if not isinstance(loss, Tensor) or not loss.is_floating_point() or loss.dim():
        what = (
            f"a tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else f"a {type(loss).__name__}"
        )
        if isinstance(loss, Tensor) and not loss.dim():
            what = f"a tensor of {loss.dtype}"
        raise InputError(
            f"the criterion returns {what}, expected the mean loss, a floating tensor of shape (): reduction='mean'"
        )
    return loss


def refuse_broadcast(criterion: Criterion, outputs: Tensor, targets: Tensor) -> None:
    """Raise `InputError` where a criterion compares each output with every target, as a loss of outputs (n, 1) and
    targets (n,) does: then it is the same whatever the order of the targets, and another one in one shape. One that
    brings both into one shape itself is as it should be.
    """
    if outputs.shape == targets.shape:
        return
    if _is_of_numbers(criterion):  # torch's own, which all want one shape
        raise InputError(
            f"the criterion compares outputs of shape {tuple(outputs.shape)} with targets of shape "
            f"{tuple(targets.shape)}: give both one shape"
        )
    if outputs.numel() != targets.numel():
        return
    # not the outputs themselves: at a head of zeros they are all the same, and then so is the loss
    others = torch.linspace(0.1, 0.9, outputs.numel()).to(outputs).view(outputs.shape)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the sizes
        try:
            given, rolled, reshaped = (
                criterion(others, each)
                for each in (targets, targets.roll(1, 0), targets.reshape(outputs.shape))
            )
        except Exception:  # it takes one of the shapes alone, and so compares none with every other
            return
    if torch.allclose(given, rolled, rtol=1e-5) and not torch.allclose(given, reshaped, rtol=1e-3):
        raise InputError(
            f"the criterion compares outputs of shape {tuple(outputs.shape)} with targets of shape "
            f"{tuple(targets.shape)}, each with every other: give both one shape"
        )


NUMBERS = (
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss, F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
)  # fmt: skip
MODULES_OF_NUMBERS = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss, nn.BCELoss, nn.BCEWithLogitsLoss,
)  # fmt: skip


def as_numbers(criterion: Criterion, outputs: Tensor, targets: Tensor) -> Tensor:
    """The targets, as numbers of the outputs' dtype where a loss of torch compares with numbers: it takes whole ones in
    some engines and not in others.
    """
    if targets.is_floating_point() or not _is_of_numbers(criterion):
        return targets
    return targets.to(outputs.dtype)


def _is_of_numbers(criterion: Any) -> bool:
    criterion = unwrapped(criterion)
    if not isinstance(criterion, MODULES_OF_NUMBERS):
        return criterion in NUMBERS
    return any(type(criterion).forward is kind.forward for kind in MODULES_OF_NUMBERS)


def refuse_meaningless(criterion: Criterion, outputs: Tensor, targets: Tensor) -> None:
    """Raise `InputError` where a cross-entropy takes the outputs and targets of a task, and its value means nothing."""
    if ignored_label(criterion) is None:
        return
    if outputs.dim() > 1 and outputs.shape[1] == 1:
        raise InputError(
            f"the model's outputs have shape {tuple(outputs.shape)}, a single class, of which the cross-entropy is "
            "always 0: give another criterion, as F.mse_loss for a regression"
        )
    if targets.is_floating_point() and targets.shape == outputs.shape and targets.min() < 0:
        raise InputError(
            f"floating targets of a cross-entropy are probabilities, got {targets.min():.3g}: give another criterion, "
            "as F.mse_loss for a regression"
        )


def unlike(error: RuntimeError, model: nn.Module, inputs: Tensor) -> str | None:
    """Why a model does not take inputs of another dtype or on another device than its parameters, if that is why."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    text = str(error)
    dtypes = {parameter.dtype for parameter in parameters}
    if (
        parameters
        and inputs.dtype not in dtypes
        and any(word in text for word in ("dtype", "scalar type", "same type"))
    ):
        own = parameters[0].dtype
        images = (
            ", or decode images as pixels() of fomaml.data.source does" if inputs.dtype == torch.uint8 else ""
        )
        return (
            f"the inputs are {inputs.dtype} and the model's parameters {own}: give inputs.to({own}){images}"
        )
    devices = {parameter.device for parameter in parameters}
    if parameters and inputs.device not in devices and "device" in text:
        own = parameters[0].device
        return f"the inputs are on {inputs.device} and the model's parameters on {own}: give tasks.to({str(own)!r})"
    return None
