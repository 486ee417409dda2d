"""What a model or a criterion returns, and would mean nothing: seen before anything is computed from it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.errors import InputError
from fomaml.learning.contracts import Criterion, Output, unwrapped
from fomaml.metrics import ignored_label
from fomaml.models import NATIVE_BATCH_NORMS, takes_statistics, third_order_is_refused
from fomaml.tasks import Task
from fomaml.trees import Tree, as_tree, call, leaves, named, structure


def selected(returned: Any, output: Output) -> Any:
    """The part of what a model returns that is judged.

    Raises:
        InputError: there is no such part.
    """
    if output is None:
        return returned
    if callable(output):
        return output(returned)
    if isinstance(returned, Tensor):
        raise InputError(f"output={output!r}: the model returns {described(returned)}, which has no parts")
    try:
        if isinstance(output, str) and not isinstance(returned, Mapping):
            return getattr(returned, output)
        return returned[output]
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise InputError(f"output={output!r}: the model returns {described(returned)}") from error


def checked_outputs(outputs: Any, criterion: Criterion | None) -> Tree:
    """What a model returns, or the part of it that is judged: a tensor, or a dict or tuple of tensors.

    Raises:
        InputError: something else, or several tensors where the criterion is one of torch's.
    """
    if isinstance(outputs, Tensor):
        return outputs
    of_torch = ignored_label(criterion) is not None or _is_of_numbers(criterion)
    cure = "give output=, the name or the number of the part that is judged, or a function that takes it"
    if of_torch or not isinstance(outputs, Mapping | list | tuple):
        raise InputError(f"the model returns {described(outputs)}, expected one tensor of outputs: {cure}")

    def refuse(value: Any, path: str) -> Tensor:
        if isinstance(value, Tensor):
            return value
        raise InputError(f"the {path} of the model are a {type(value).__name__}, expected tensors: {cure}")

    return as_tree(outputs, refuse, "outputs")


def described(returned: Any) -> str:
    """What a model returns, and the parts it has."""
    kind = f"a {type(returned).__name__}"
    if isinstance(returned, Mapping):
        return f"{kind} with {', '.join(map(repr, returned))}"
    if isinstance(returned, list | tuple) and not hasattr(returned, "_fields"):
        return f"{kind} of {len(returned)}"
    if isinstance(returned, Tensor):
        return f"a tensor of shape {tuple(returned.shape)}"
    names = getattr(returned, "_fields", None) or [
        n for n in getattr(returned, "__dict__", ()) if n[:1] != "_"
    ]
    return f"{kind} with {', '.join(map(repr, names))}" if names else kind


def refuse_call(error: TypeError, model: nn.Module, inputs: Tree) -> None:
    """Raise `InputError` where the inputs are not what forward takes: other keywords, or another number."""
    try:
        signature = inspect.signature(model.forward)
        call(signature.bind, inputs)
    except TypeError as reason:
        keys = ", ".join(inputs) if isinstance(inputs, dict) else None
        what = f"a dict of {keys}, which go to the model as keywords" if keys else ""
        if not what:
            number = 1 if isinstance(inputs, Tensor) else len(inputs)
            what = f"{number} tensor{'s' if number > 1 else ''}, which go to the model in order"
        raise InputError(
            f"the inputs are {what}; forward of {type(model).__name__} takes {signature}: {reason}"
        ) from error
    except ValueError:  # a forward without a signature
        return


def checked_loss(loss: Any, name: str = "criterion") -> Tensor:
    """What a criterion returns, or a loss.

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
            f"the {name} returns {what}, expected the mean loss, a floating tensor of shape (): reduction='mean'"
        )
    return loss


def targets_for(criterion: Criterion, outputs: Tree, targets: Tree, by_value: bool = True) -> Tree:
    """The targets as a criterion takes them, once it was seen that outputs and targets go together.

    by_value: look at their values too, which vmap does not tell.
    """
    targets = as_numbers(criterion, outputs, targets)
    refuse_shapes(criterion, outputs, targets)
    if by_value:
        refuse_meaningless(criterion, outputs, targets)
        refuse_broadcast(criterion, outputs, targets)
    return targets


def refuse_shapes(criterion: Criterion, outputs: Tree, targets: Tree) -> None:
    """Raise `InputError` where a loss of torch, which compares numbers of one shape, is to compare others."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)) or outputs.shape == targets.shape:
        return
    if _is_of_numbers(criterion):
        raise InputError(
            f"the criterion compares outputs of shape {tuple(outputs.shape)} with targets of shape "
            f"{tuple(targets.shape)}: give both one shape"
        )


def refuse_broadcast(criterion: Criterion, outputs: Tree, targets: Tree) -> None:
    """Raise `InputError` where a criterion compares each output with every target, as a loss of outputs (n, 1) and
    targets (n,) does: then it is the same whatever the order of the targets, and another one in one shape. One that
    brings both into one shape itself is as it should be.
    """
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)) or outputs.shape == targets.shape:
        return
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


def refuse_as_loss(loss: Any) -> None:
    """Raise `InputError` for a criterion of torch that is given as a loss of the general form."""
    if ignored_label(loss) is not None or _is_of_numbers(loss):
        raise InputError(
            "loss= is a function (forward, examples); one of outputs and targets is the criterion"
        )


def as_numbers(criterion: Criterion, outputs: Tree, targets: Tree) -> Tree:
    """The targets, as numbers of the outputs' dtype where a loss of torch compares with numbers: it takes whole ones in
    some engines and not in others.
    """
    if not _is_of_numbers(criterion) or not isinstance(targets, Tensor) or targets.is_floating_point():
        return targets
    return targets.to(outputs.dtype)


def _is_of_numbers(criterion: Any) -> bool:
    criterion = unwrapped(criterion)
    if not isinstance(criterion, MODULES_OF_NUMBERS):
        return criterion in NUMBERS
    return any(type(criterion).forward is kind.forward for kind in MODULES_OF_NUMBERS)


def refuse_meaningless(criterion: Criterion, outputs: Tree, targets: Tree) -> None:
    """Raise `InputError` where a cross-entropy takes the outputs and targets of a task, and its value means nothing; or
    where a loss of torch is to compare outputs with several targets.
    """
    if not isinstance(targets, Tensor) and (
        ignored_label(criterion) is not None or _is_of_numbers(criterion)
    ):
        what = f"{len(leaves(targets))} tensors" if leaves(targets) else "none"
        raise InputError(
            f"the criterion takes one tensor of targets, and the task has {what}: give a criterion or a loss= of your "
            "own"
        )
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


def unlike(error: RuntimeError, model: nn.Module, inputs: Tree) -> str | None:
    """Why a model does not take inputs of another dtype or on another device than its parameters, if that is why."""
    if not isinstance(inputs, Tensor):
        floating = [leaf for leaf in leaves(inputs) if leaf.is_floating_point()]
        reasons = (unlike(error, model, leaf) for leaf in floating)
        return next((reason for reason in reasons if reason), None)
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    text = str(error)
    dtypes = {parameter.dtype for parameter in parameters}
    if (
        parameters
        and inputs.dtype not in dtypes
        and any(word in text for word in ("dtype", "scalar type", "same type", "should be the same"))
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


def refuse_written(before: Task, after: Task) -> None:
    """Raise `InputError` where a forward pass, a criterion or a loss has written into the examples it was given: each
    inner step, and each call, would then find other ones.
    """
    for name, set_before, set_after in zip(Task._fields, before, after):
        for part, old, new in zip(set_before._fields, set_before, set_after):
            for (place, own), now in zip(named(old, f"{name} {part}"), leaves(new)):
                # what is nan stays it
                if not torch.equal(now, own) and not ((now == own) | (own != own)).all():
                    raise InputError(
                        f"forward, or the criterion or loss, writes into the {place}, which are the task's own and "
                        "come again in each step: x = x - 1 in place of x -= 1, and inplace=False in the first layer"
                    )


THIRD_ORDER = (
    "a loss= that differentiates by inputs once in second order, or twice in first order, differentiates batch norms "
    "three times, which torch's own do not take: fomaml.convert_batch_norm(model)"
)


def refuse_third_order(model: nn.Module) -> None:
    """Raise `InputError` for batch norms that torch would differentiate three times, and be wrong without a word."""
    if third_order_is_refused():  # by torch, and only where it happens
        return
    if any(isinstance(each, NATIVE_BATCH_NORMS) and takes_statistics(each) for each in model.modules()):
        raise InputError(THIRD_ORDER)


def refuse_unlike(support: Tree, query: Tree) -> None:
    """Raise `InputError` where support and query inputs cannot stand in one batch."""
    shapes = [(structure(inputs), [leaf.shape[1:] for leaf in leaves(inputs)]) for inputs in (support, query)]
    if shapes[0] != shapes[1]:
        raise InputError(
            "the statistics of the support set are of a batch with the query examples, and support and query inputs "
            "differ in their shapes or names: take the statistics 'own'"
        )
