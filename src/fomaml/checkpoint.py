"""Weights and training states as safetensors files, written beside and renamed: whole or not there; no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fomaml.errors import InputError
from fomaml.files import replacing


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping | None = None) -> None:
    """Write named tensors, and JSON-able facts in the file's header, atomically and flushed to disk."""
    own = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    with replacing(path) as temporary:
        save_file(own, temporary, {"fomaml": json.dumps(dict(facts or {}))})


def load_tensors(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict]:
    """Read a file of `save_tensors`: the tensors by name, and the facts.

    Raises:
        InputError: the file is not there, or damaged.
    """
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {}).get("fomaml", "{}"))
    except FileNotFoundError:
        raise InputError(f"no file {path}: was the run finished?") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error})") from None


def save_weights(path: Path, module: nn.Module) -> None:
    """Write a module's parameters and buffers; tied ones are written once each under their own names."""
    save_tensors(path, module.state_dict())


def load_weights(path: Path, module: nn.Module) -> nn.Module:
    """Read parameters and buffers into a module, in place; returns it.

    Raises:
        InputError: a damaged file, or names or shapes that are not the module's.
    """
    tensors, _ = load_tensors(path)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} does not fit the model: {reason}") from None
    return module


def save_state(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    progress: Mapping | None = None,
) -> None:
    """Write all that a run needs to go on: parameters, buffers, the optimiser's state, the iteration, and the
    state of torch's random numbers on the CPU, which dropout draws from.

    progress: further JSON-able facts, for `load_progress`.
    """
    state = optimizer.state_dict()
    tensors = {f"module/{name}": t for name, t in module.state_dict().items()}
    tensors["random"] = torch.get_rng_state()
    numbers: dict[str, dict] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    facts = {
        "iteration": iteration,
        "groups": state["param_groups"],
        "numbers": numbers,
        "progress": dict(progress or {}),
    }
    save_tensors(path, tensors, facts)


def load_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read a file of `save_state` into a module and its optimiser, in place; returns the iteration.

    Raises:
        InputError: a damaged file, or one of another module or optimiser.
    """
    tensors, facts = load_tensors(path)
    own = {n.removeprefix("module/"): t for n, t in tensors.items() if n.startswith("module/")}
    state: dict[int, dict] = {int(i): dict(v) for i, v in facts.get("numbers", {}).items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            state.setdefault(int(index), {})[key] = tensor
    try:
        for group, saved in zip(optimizer.param_groups, facts["groups"]):
            if missing := group.keys() - saved.keys() - {"initial_lr"}:
                raise ValueError(f"it holds no {sorted(missing)[0]!r} of {type(optimizer).__name__}")
        module.load_state_dict(own)
        optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})
        torch.set_rng_state(tensors["random"])
        return facts["iteration"]
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no state of this run: {reason}") from None


def load_progress(path: Path) -> dict:
    """The further facts of a file of `save_state`.

    Raises:
        InputError: the file is not there, or damaged.
    """
    return load_tensors(path)[1].get("progress", {})
