"""The forward pass at the weights of one task: how it is called, what of its outputs is judged, how vmap takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fomaml.errors import InputError
from fomaml.learning.contracts import Learner
from fomaml.learning.mistakes import checked_outputs, refuse_call, selected, unlike
from fomaml.trees import Tree, call


class Forward:
    """The model at the weights of a task, as a loss gets it.

    It is called as the model is, and its attributes are the model's. Where the inputs of a task are a dict, one dict
    goes to the model as keywords, and where they are a tuple, one tuple as positional arguments.
    """

    def __init__(self, run: Callable[..., Any], model: nn.Module, inputs: Tree):
        self._run, self._model, self._inputs = run, model, inputs

    def __call__(self, *args, **kwargs) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], type(self._inputs)):
            return called(self._run, self._model, args[0])
        return self._run(*args, **kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self._model[key]  # type: ignore[index]

    def __getattr__(self, name: str) -> Any:
        # within a loss the model itself holds the weights of the task, see `Replicas.holding`
        return getattr(self._model, name)


def called(run: Callable[..., Any], model: nn.Module, inputs: Tree) -> Any:
    """What the model returns for the inputs of a task.

    run: its forward pass.

    Raises:
        InputError: inputs that forward does not take, or of another dtype or on another device than its parameters.
    """
    try:
        return call(run, inputs)
    except TypeError as error:
        refuse_call(error, model, inputs)
        raise
    except RuntimeError as error:
        reason = unlike(error, model, inputs)
        if reason is None:
            raise
        raise InputError(reason) from error


def outputs_of(learner: Learner, run: Callable[..., Any], inputs: Tree) -> tuple[Tree, Any]:
    """What is judged of what the model returns for the inputs of a task: its tensors, and as it is."""
    returned = selected(called(run, learner.model, inputs), learner.output)
    return checked_outputs(returned, learner.criterion), returned


class Stacked(TorchFunctionMode):
    """Within it, functions whose batching rule (torch 2.14) is wrong or slow are called so that vmap does well.

    `F.embedding` puts the tables of all tasks one below the other and knows the `padding_idx` of the first alone: in
    all other tasks the padding learned (meta-gradients 6 % off and more, without an error). `F.linear` of inputs that
    are not contiguous, as attention's are, copies the weight once for each token.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in UNDER_VMAP and not _called_by_torch():
            raise InputError(UNDER_VMAP[function])
        inputs = {F.linear: 1, F.multi_head_attention_forward: 3}.get(function, 0)
        if inputs:
            # query, key and value may be one tensor, and are to stay one
            once = {id(tensor): tensor.contiguous() for tensor in args[:inputs]}
            args = (*(once[id(tensor)] for tensor in args[:inputs]), *args[inputs:])
        elif function is F.embedding:
            weight, index = args[1], kwargs.pop("padding_idx")  # as F.embedding hands them over
            if index is not None:
                padding = torch.arange(len(weight), device=weight.device)[:, None] == index % len(weight)
                args = (args[0], torch.where(padding, weight.detach(), weight))
        return function(*args, **kwargs)


def _called_by_torch() -> bool:
    """Whether it is a function of `torch.func` that calls what is intercepted."""
    frame: Any = inspect.currentframe()
    between = {__name__, torch.overrides.__name__, torch.autograd.__name__, Tensor.backward.__module__}
    while frame is not None and frame.f_globals.get("__name__") in between:
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith("torch.")


CURE = "torch.func.grad or torch.func.jacrev, or engine='loop'"
# What does nothing under vmap, or something else, and what to write instead.
UNDER_VMAP: dict[Callable, str] = {
    Tensor.register_hook: "a hook of the backward pass, which does not run under vmap: engine='loop'",
    Tensor.requires_grad_: f"requires_grad_ makes no leaf of a tensor under vmap: {CURE}",
    torch.autograd.grad: f"torch.autograd.grad differentiates nothing under vmap: {CURE}",
    Tensor.backward: f"backward differentiates nothing under vmap: {CURE}",
}
