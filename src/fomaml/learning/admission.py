"""Which modules no replica can be made of, by what they are and by what their forward pass does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from fomaml.errors import InputError


def check_module(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], dict[str, nn.Parameter]]:
    """The modules of a model, with their names, and its parameters by name, each once.

    Raises:
        InputError: a module whose tensors cannot be replaced: a wrapper that keeps others of its own, such as
            `nn.parallel.DistributedDataParallel`, a compiled or a scripted module, a lazy one that has no shape yet,
            and one with a hook on the gradient of a parameter, which the gradients of replicas do not pass.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is an nn.Module, got a {type(model).__name__}")
    modules, parameters = [*model.named_modules()], dict(model.named_parameters())
    for name, module in modules:
        cure = _wrapper(module)
        if cure:
            what = f"the module {name!r}" if name else "the model"
            raise InputError(
                f"{what}, {type(module).__name__}, keeps its parameters from being replaced: {cure}"
            )
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(
                f"the lazy parameter {name!r} has no shape yet: run the module once on a batch before"
            )
        if parameter.is_inference():
            raise InputError(
                f"the parameter {name!r} was made in inference mode: make the module outside of it"
            )
        if type(parameter).__module__.startswith("torch.distributed"):
            raise InputError(
                f"the parameter {name!r} is spread over processes: give the module as it was before"
            )
        if parameter.requires_grad and getattr(parameter, "_backward_hooks", None):
            raise InputError(
                f"a hook on the gradient of the parameter {name!r}: gradients here are of a task's own copy of it, "
                "where the hook does not run; mask the parameter in forward instead (torch.nn.utils.parametrize)"
            )
    return modules, parameters


def check_parameters(parameters: Mapping[str, Tensor], trainable: Set[str], adapted: Iterable[str]) -> None:
    """Raise `InputError` where the model's parameters are others than when the learner was made.

    trainable, adapted: the names of those that required gradients then, and of those that adapt.
    """
    own = {name: p.requires_grad for name, p in parameters.items()}
    late = [name for name, learns in own.items() if learns and name not in trainable]
    gone = [name for name in adapted if name not in own]
    if late or gone:
        what = f"{late[0]} was frozen or not there" if late else f"{gone[0]} is no longer there, as it was"
        raise InputError(f"the parameter {what} when the learner was made: make a new learner")


def _wrapper(module: nn.Module) -> str:
    """What to give in place of a module that keeps its parameters to itself; "" for any other."""
    origin = type(module).__module__
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return (
            "give the module that it wraps, its .module; for many processes, train(..., group="
            "torch.distributed.group.WORLD), or torchrun -m fomaml train"
        )
    if origin.startswith("torch.distributed"):
        return "give the module that it wraps"
    if origin.startswith("torch._dynamo"):
        return "give the module that was compiled, its ._orig_mod, and compile=True where you train it"
    scripted = isinstance(module, torch.jit.ScriptModule)
    if scripted and any(True for _ in chain(module.parameters(), module.buffers())):
        return "give the module that it was made of"
    return ""


@contextmanager
def calls_refused(index: Set[int], cure: str = "call it as an attribute of self") -> Iterator[None]:
    """Within it a forward pass that calls a module of the tree itself, and not its replica, is an `InputError`."""

    def refuse(module, args):
        if id(module) in index:
            raise InputError(
                f"the module calls its {type(module).__name__} by a reference that no copy of it follows, such as a "
                f"global variable or an object of your own: {cure}"
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


class ReadsRefused(TorchFunctionMode):
    """Within it a forward pass that computes with a parameter of the module itself, and not with the tensor in its
    place, is an `InputError`.

    names: of these parameters, by their ids.
    """

    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self._names = names

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.requires_grad:
            for given in (*args, *(kwargs or {}).values()):
                for each in given if isinstance(given, list | tuple) else (given,):
                    if id(each) in self._names:
                        raise InputError(
                            f"the module reads its parameter {self._names[id(each)]!r} by a reference that no copy of "
                            "it follows, such as a global variable or an object of your own: read it as an attribute "
                            "of self"
                        )
        return found
