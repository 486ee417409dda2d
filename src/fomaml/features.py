"""Frozen features: embed a data set once, keep the vectors on disk, and run episodes on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fomaml.data.groups import GroupSource
from fomaml.data.source import ClassSource
from fomaml.errors import InputError, in_one_line, positive
from fomaml.files import digest_of, load_tensors, save_tensors
from fomaml.learning.contracts import Output
from fomaml.learning.forward import called
from fomaml.learning.mistakes import selected
from fomaml.models import warn_of_unmoved
from fomaml.sealed import settings_digest
from fomaml.trees import Tree, mapped
from fomaml.trees import named as by_place

Source = TypeVar("Source", ClassSource, GroupSource)
AT_ONCE = 4096  # rows whose digest is taken at once


def embed(
    model: nn.Module,
    source: Source,
    *,
    layer: str | None = None,
    output: Output = None,
    batch_size: int = 256,
    path: str | Path | None = None,
) -> Source:
    """The same classes and examples, or groups and rows, each input being what a frozen model makes of it.

    The model runs once over all examples, in evaluation mode, without gradients, on its own device; episodes of the
    result cost no forward pass of it. On vectors a new head adapts, such as `nn.Linear(512, ways)`; on the outputs of
    an inner layer those after it do, such as `nn.Sequential(model.layer4, model.global_pool, nn.Linear(512, ways))`.

    Arguments:
        model: inputs as the source draws them → (examples, ...), see `fomaml.backbones.backbone`. A dict of inputs goes
            to it as keywords, a tuple as positional arguments.
        layer: the name of a submodule whose outputs are taken, instead of the model's.
        output: which part of what it returns is taken, as of `MetaLearner`: "last_hidden_state", 0, a function.
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
    if not isinstance(source, ClassSource | GroupSource):
        raise InputError(f"embed takes a ClassSource or a GroupSource, got a {type(source).__name__}")
    batch_size = positive("batch_size", batch_size, integer=True)
    number = len(source.inputs) if isinstance(source, ClassSource) else len(source.rows)
    what = (
        f"{layer} {output}" if isinstance(output, str | int) else str(layer)
    )  # of a function, vectors are compared
    key = {} if path is None else _key(model, source, what)
    file = None if path is None else _file(Path(path).expanduser(), key)
    with _frozen(model):
        warn_of_unmoved(model)
        run = _Run(model, source, layer, output)
        if file is not None and file.exists():
            found = _read(file, key, number)
            run.compare(
                found, f"{file} holds other vectors than the model gives now: delete it, or give another path"
            )
            return _with(source, found)
        found = torch.cat([run(part) for part in torch.arange(number).split(batch_size)])
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

    def __init__(
        self, model: nn.Module, source: ClassSource | GroupSource, layer: str | None, output: Output
    ):
        self.model, self.source, self.layer, self.output = model, source, layer, output
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if layer is not None and layer not in dict(model.named_modules()):
            names = ", ".join(name for name, _ in model.named_children())
            raise InputError(f"the model has no layer {layer!r}; it has {names} and what is in these")

    def __call__(self, rows: Tensor) -> Tensor:
        inputs = mapped(lambda tensor: tensor.to(self.device), _drawn(self.source, rows))
        caught: list[Any] = []

        def catch(module: nn.Module, inputs: Tree, outputs: Any) -> None:
            found = selected(outputs, self.output)
            # a layer behind may work in place, as nn.ReLU(inplace=True) does
            caught.append(found.clone() if isinstance(found, Tensor) else found)

        hook = None
        if self.layer is not None:
            hook = self.model.get_submodule(self.layer).register_forward_hook(catch)
        try:
            outputs = called(self.model, self.model, inputs)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            kinds = ", ".join(f"{place}{leaf.dtype} {tuple(leaf.shape)}" for place, leaf in by_place(inputs))
            raise InputError(f"the model does not take inputs {kinds}: {in_one_line(error)}") from error
        finally:
            if hook is not None:
                hook.remove()
        if self.layer is not None:
            if len(caught) != 1:
                raise InputError(
                    f"the layer {self.layer!r} runs {len(caught)} times in a forward pass, not once: take another"
                )
            outputs = caught[0]
        else:
            outputs = selected(outputs, self.output)
        if not isinstance(outputs, Tensor) or outputs.shape[:1] != rows.shape:
            what = tuple(outputs.shape) if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise InputError(
                f"the {'model' if self.layer is None else 'layer'} gives {what} for {len(rows)} examples, expected a "
                "tensor with one row for each; say by layer= or output= what to take"
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


def _drawn(source: ClassSource | GroupSource, rows: Tensor) -> Tree:
    """What a source gives of these rows, in its own order of them."""
    return source.take(rows) if isinstance(source, ClassSource) else source.take(rows.numpy())[0]


def _with(source: Source, vectors: Tensor) -> Source:
    if isinstance(source, ClassSource):
        return ClassSource(vectors, source.labels(), source.names)
    return source.with_inputs(vectors)


# --- on disk --------------------------------------------------------------------------------------


def _key(model: nn.Module, source: ClassSource | GroupSource, what: str) -> dict[str, str]:
    """Digests of what makes the model's outputs, its structure in words and all its tensors, and of the data.

    Inputs may not fit in memory: those that are stored are digested a part at a time, of groups as they are drawn.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if isinstance(source, ClassSource):
        data = {"inputs": source.inputs.to("cpu"), "counts": source.counts}
        of_data = digest_of(data, {"names": source.names})
    else:
        parts = torch.arange(len(source.rows)).split(AT_ONCE)
        drawn = (dict(by_place(_drawn(source, part), "inputs")) for part in parts)
        of_inputs = [digest_of({place: leaf.cpu() for place, leaf in each.items()}, {}) for each in drawn]
        counts = source.counts.tolist()
        of_data = settings_digest({"inputs": of_inputs, "names": source.names, "counts": counts})
    return {"weights": digest_of(weights, {"model": str(model), "what": what}), "data": of_data}


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
