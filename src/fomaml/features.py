"""Frozen features: embed a data set once, keep the vectors on disk, and run episodes on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fomaml.data.source import ClassSource
from fomaml.errors import InputError, in_one_line, positive
from fomaml.files import digest_of, load_tensors, save_tensors, settings_digest
from fomaml.models import warn_of_unmoved


def embed(
    model: nn.Module,
    source: ClassSource,
    *,
    layer: str | None = None,
    batch_size: int = 256,
    path: str | Path | None = None,
) -> ClassSource:
    """The same classes and examples, each input being what a frozen model makes of it.

    The model runs once over all examples, in evaluation mode, without gradients, on its own device; episodes of the
    result cost no forward pass of it. On vectors a new head adapts, such as `nn.Linear(512, ways)`; on the outputs of
    an inner layer those after it do, such as `nn.Sequential(model.layer4, model.global_pool, nn.Linear(512, ways))`.

    Arguments:
        model: inputs as the source draws them → (examples, ...), see `fomaml.backbones.backbone`.
        layer: the name of a submodule whose outputs are taken, instead of the model's.
        batch_size: examples at once.
        path: a .safetensors file that keeps the vectors, or a folder of one such file for each model and data. They
            are read from there where it is, once its digest is right, its weights and data are these, and the model
            still makes the same of three of the examples.

    Returns a source whose inputs (examples, ...) are on the CPU, in the dtype that the model gives.

    Raises:
        InputError: a file of other weights or other data, or a damaged one; a model that does not take the inputs or
            gives no tensor of one row for each, or whose rows depend on others of the batch, as by batch statistics; a
            layer that is not there, or does not run once in a forward pass.

    Warns: batch norms that normalise by statistics which nothing has ever moved.
    """
    if not isinstance(source, ClassSource):
        raise InputError(f"embed takes a ClassSource, got a {type(source).__name__}")
    batch_size = positive("batch_size", batch_size, integer=True)
    key = {} if path is None else _key(model, source, layer)
    file = None if path is None else _file(Path(path).expanduser(), key)
    with _frozen(model):
        warn_of_unmoved(model)
        run = _Run(model, source, layer)
        if file is not None and file.exists():
            found = _read(file, key, len(source.inputs))
            run.compare(
                found, f"{file} holds other vectors than the model gives now: delete it, or give another path"
            )
            return _with(source, found)
        rows = torch.arange(len(source.inputs))
        found = torch.cat([run(part) for part in rows.split(batch_size)])
        run.compare(
            found,
            "what the model makes of an example depends on the others of its batch, as by batch statistics: "
            "fomaml.convert_batch_norm(model, 'frozen')",
        )
    if file is not None:
        save_tensors(file, {"vectors": found}, key)
    return _with(source, found)


class _Run:
    """What a model, or a layer of it, makes of the rows of a source."""

    def __init__(self, model: nn.Module, source: ClassSource, layer: str | None):
        self.model, self.source, self.layer = model, source, layer
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if layer is not None and layer not in dict(model.named_modules()):
            names = ", ".join(name for name, _ in model.named_children())
            raise InputError(f"the model has no layer {layer!r}; it has {names} and what is in these")

    def __call__(self, rows: Tensor) -> Tensor:
        inputs = self.source.take(rows).to(self.device)
        caught: list[Tensor] = []
        hook = None
        if self.layer is not None:
            inner = self.model.get_submodule(self.layer)
            hook = inner.register_forward_hook(lambda _, inputs, outputs: caught.append(outputs))
        try:
            outputs = self.model(inputs)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            shape = f"{inputs.dtype} of shape {tuple(inputs.shape)}"
            raise InputError(f"the model does not take inputs {shape}: {in_one_line(error)}") from error
        finally:
            if hook is not None:
                hook.remove()
        if self.layer is not None:
            if len(caught) != 1:
                raise InputError(
                    f"the layer {self.layer!r} runs {len(caught)} times in a forward pass, not once: take another"
                )
            outputs = caught[0]
        if not isinstance(outputs, Tensor) or outputs.shape[:1] != rows.shape:
            what = tuple(outputs.shape) if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise InputError(
                f"the {'model' if self.layer is None else 'layer'} gives {what} for {len(rows)} examples, expected a "
                "tensor with one row for each; name a layer= that does"
            )
        return outputs.detach().cpu()

    def compare(self, found: Tensor, message: str) -> None:
        """Raise `InputError` with the message unless the first, middle and last example, each by itself, give these.

        Batches of other sizes, and other devices, round differently: a thousandth of the largest number is no matter.
        """
        for row in {0, len(found) // 2, len(found) - 1}:
            alone = self(torch.tensor([row]))[0]
            exact = alone.dtype in (torch.float32, torch.float64)
            scale = found[row].abs().max() if found[row].numel() else 0
            if alone.shape != found[row].shape or alone.dtype != found.dtype:
                raise InputError(message)
            if not bool((alone - found[row]).abs().le((1e-3 if exact else 3e-2) * scale).all()):
                raise InputError(message)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; then each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def _with(source: ClassSource, vectors: Tensor) -> ClassSource:
    return ClassSource(vectors, source.labels(), source.names)


# --- on disk --------------------------------------------------------------------------------------


def _key(model: nn.Module, source: ClassSource, layer: str | None) -> dict[str, str]:
    """Digests of what makes the model's outputs, its structure in words and all its tensors, and of the data."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    data = {"inputs": source.inputs.cpu(), "counts": source.counts}
    return {
        "weights": digest_of(weights, {"model": str(model), "layer": layer}),
        "data": digest_of(data, {"names": source.names}),
    }


def _file(path: Path, key: dict[str, str]) -> Path:
    """The file itself, or the one in the folder."""
    return (
        path if path.suffix == ".safetensors" else path / f"features-{settings_digest(key)[:16]}.safetensors"
    )


def _read(path: Path, key: dict[str, str], rows: int) -> Tensor:
    tensors, facts = load_tensors(path)
    for part in ("weights", "data"):
        if facts.get(part) != key[part]:
            raise InputError(
                f"{path} was made of other {part}: delete it, or give a folder, which has a file for each"
            )
    if tensors.keys() != {"vectors"} or len(tensors["vectors"]) != rows:
        raise InputError(f"{path} is damaged: it does not hold {rows} vectors; delete it")
    return tensors["vectors"]
