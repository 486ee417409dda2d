"""Weights and training states as files of tensors: whole or not there, and still what was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fomaml.devices import random_state, set_random_state
from fomaml.errors import InputError, plain, whole
from fomaml.files import load_tensors, save_tensors
from fomaml.finite import not_finite
from fomaml.layout import lay_out

RANDOM = "random"  # the name of the CPU's state; "random/cuda:0" is that of a GPU


def save_weights(path: str | Path, module: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
    """Write a module's parameters and buffers; tied ones are written once each under their own names.

    path: its folder is made where it is missing; ~ is the user's own.
    settings: JSON-able; the file keeps their digest, for `load_weights` to compare.

    Raises:
        InputError: a path that no file can be written to, or state of the module that is no tensor.
    """
    save_tensors(path, module.state_dict(), settings=settings)


def load_weights(
    path: str | Path, module: nn.Module, settings: Mapping[str, Any] | None = None, checked: bool = False
) -> nn.Module:
    """Read parameters and buffers into a module, in place; returns it.

    checked: refuse a file without digests, see `load_tensors`.

    Raises:
        InputError: a damaged file, one that was written for other settings, names, shapes or dtypes that are not the
            module's, or numbers that are not finite where the module's own are.
    """
    tensors, _ = load_tensors(path, settings=settings, checked=checked)
    return fill(module, tensors, path)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """Set a module's parameters and buffers, in place; returns it. path: where they were read, for the message.

    Raises:
        InputError: names, shapes or dtypes that are not the module's, or numbers that are not finite where the module's
            own are.
    """
    own = module.state_dict()
    for name in own.keys() & tensors.keys():
        if tensors[name].dtype != own[name].dtype:
            raise InputError(
                f"{path} does not fit the model: {name} is {tensors[name].dtype}, expected {own[name].dtype}"
            )
    if bad := not_finite(tensors) - not_finite(own):  # a mask may be infinite
        raise InputError(f"{path} holds numbers that are not finite, in {min(bad)}: use other weights")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} does not fit the model: {reason}") from None
    return module


def save_state(
    path: str | Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    progress: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write all that a run needs to go on: parameters, buffers, the optimiser's state, the iteration, and the
    states of torch's random numbers, which dropout draws from, on the CPU and on each GPU in use.

    progress: further JSON-able facts, for `load_progress`.
    settings: JSON-able; the file keeps their digest, for `load_state` to compare.

    Raises:
        InputError: a path that no file can be written to.
    """
    state = optimizer.state_dict()
    tensors = {f"module/{name}": t for name, t in module.state_dict().items()}
    tensors |= {RANDOM if name == "cpu" else f"{RANDOM}/{name}": own for name, own in random_state().items()}
    numbers: dict[str, dict] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    facts = {
        "iteration": whole("iteration", iteration),
        "groups": [{name: _plain(value) for name, value in group.items()} for group in state["param_groups"]],
        "numbers": numbers,
        "progress": dict(progress or {}),
    }
    save_tensors(path, tensors, facts, settings)


def load_state(
    path: str | Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any] | None = None,
    checked: bool = False,
) -> int:
    """Read a file of `save_state` into a module and its optimiser, in place; returns the iteration.

    checked: refuse a file without digests, see `load_tensors`.

    Raises:
        InputError: a damaged file, one that was written for other settings, or one of another module or optimiser.
    """
    tensors, facts = load_tensors(path, settings=settings, checked=checked)
    own = {n.removeprefix("module/"): t for n, t in tensors.items() if n.startswith("module/")}
    try:
        state: dict[int, dict] = {int(i): dict(v) for i, v in facts.get("numbers", {}).items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = tensor
        for group, saved in zip(optimizer.param_groups, facts["groups"]):
            if missing := group.keys() - saved.keys() - {"initial_lr"}:
                raise ValueError(f"it holds no {sorted(missing)[0]!r} of {type(optimizer).__name__}")
        # a step size that is a tensor stays one, as what captures or compiles the optimiser needs it
        groups = [
            {
                key: torch.full_like(group[key], value) if isinstance(group.get(key), Tensor) else value
                for key, value in saved.items()
            }
            for group, saved in zip(optimizer.param_groups, facts["groups"], strict=True)
        ]
        fill(module, own, path)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        lay_out(optimizer)
        of_gpus = {n.removeprefix(f"{RANDOM}/"): t for n, t in tensors.items() if n.startswith(f"{RANDOM}/")}
        set_random_state({"cpu": tensors[RANDOM], **of_gpus})
        return whole("iteration", facts["iteration"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no state of this run: {reason}") from None


def _plain(value: Any) -> Any:
    """An option of an optimiser as JSON has it: its numbers may be numpy's, or tensors."""
    return [plain(each) for each in value] if isinstance(value, (tuple, list)) else plain(value)


def load_progress(path: str | Path) -> dict:
    """The further facts of a file of `save_state`.

    Raises:
        InputError: the file is not there, or damaged.
    """
    return load_tensors(path)[1].get("progress", {})
