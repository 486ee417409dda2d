"""A model that holds only what adaptation has changed: the rest is read from its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fomaml.app.rundir import weights_file
from fomaml.app.settings import Weights
from fomaml.errors import InputError
from fomaml.files import digest_of, load_tensors

MODEL = "model."  # before the network's names in a file of a learner


def change_from(module: nn.Module, run: Path, weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a module that are not the run's to the bit, and what model.json says of that run.

    Raises:
        InputError: the run's weights are not there, or damaged.
    """
    theirs, digest = _read(weights_file(run, weights))
    own = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    changed = {name: own[name] for name in own if name not in theirs or not _same(own[name], theirs[name])}
    return changed, {"run": str(run.resolve()), "weights": weights, "sha256": digest}


def completed(
    changed: Mapping[str, Tensor],
    module: nn.Module,
    base: Mapping[str, Any],
    root: Path,
    run: str | Path | None,
) -> dict[str, Tensor]:
    """All tensors of a module: those that have changed, and the run's.

    base: what model.json in `root` says of the run. run: where it is by now.

    Raises:
        InputError: the run is not there, or is another.
    """
    path = Path(run if run is not None else base["run"]).expanduser()
    file = weights_file(path, base["weights"])
    if not file.exists():
        raise InputError(
            f"{root} holds only what differs from the run {path}, which is not there: bring it back, or say where it "
            "is by now, --run RUN"
        )
    theirs, digest = _read(file)
    if digest != base["sha256"]:
        raise InputError(f"{path} is not the run that {root} was made of: its weights have another digest")
    return {**{name: theirs[name] for name in module.state_dict() if name in theirs}, **changed}


def _read(file: Path) -> tuple[dict[str, Tensor], str]:
    """The network's tensors in a run's file, by their names in it, and the digest of all that the file holds."""
    tensors, _ = load_tensors(file, checked=True)
    own = {name.removeprefix(MODEL): tensor for name, tensor in tensors.items() if name.startswith(MODEL)}
    return own, digest_of(tensors, {})


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same bits: 0 and -0 are not, and no number is the same as itself."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, other = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second))
    return torch.equal(one, other)
