"""An adapted model as a program for other runtimes, with the scaling of inputs and outputs in it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fomaml.errors import InputError, in_one_line
from fomaml.files import replacing, save_tensors
from fomaml.learning.forward import called
from fomaml.learning.mistakes import selected
from fomaml.serve.adapted import AdaptedModel
from fomaml.serve.pictures import Pictures
from fomaml.trees import Tree

Form = Literal["onnx", "torch-export", "safetensors"]
SUFFIXES: dict[Form, str] = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
EXAMPLES = 3  # that a program is traced with; it takes any number
TRIED = (1, 7)  # numbers of examples that its outputs are compared for
OLDEST = (2, 8)  # torch 2.6 and 2.7 export programs for three examples alone, or none
CLOSE = 1e-4  # of probabilities, and of values over the greatest of them


class Program(nn.Module):
    """From inputs as a stranger has them to probabilities or values, all in one forward pass.

    Pictures are uint8 (examples, channels, height, width) of the run's size, dark and light as they are; numbers of
    rows are in their own units. Outputs are (examples, classes) or (examples, targets).
    """

    def __init__(self, model: AdaptedModel):
        super().__init__()
        self.network = model.module
        self.model = model

    def forward(self, *given: Tensor) -> Tensor:
        model = self.model
        inputs: Any = (
            given[0] if list(model.facts["inputs"]) == [""] else dict(zip(model.facts["inputs"], given))
        )
        pictures = isinstance(model.intake, Pictures)
        inputs = model.intake.ready(inputs) if pictures else model.scaling.scaled(inputs)  # type: ignore[attr-defined]
        found = selected(called(self.network, self.network, inputs), model.output)
        if model.classes is not None:
            return (found[:, : len(model.classes)] / model.temperature).softmax(1)
        found = found[:, None] if found.dim() == 1 else found.flatten(1)
        return model.scaling.unscaled(found)


def export(model: AdaptedModel, form: Form, path: str | Path) -> float:
    """Write a program, and return the greatest difference of its outputs from the module's, over their size.

    form: "onnx" (runs in onnxruntime), "torch-export" (`torch.export.load`), or "safetensors", the weights alone.

    Raises:
        InputError: a file that is there already; a library that is not, or a torch that is too old; a network that
            cannot be exported, or whose program gives other outputs, in which case no file stays.
    """
    path = Path(path).expanduser()
    if path.exists():
        raise InputError(f"{path} is there already; give another --out, or delete it")
    if form == "safetensors":
        save_tensors(path, model.module.state_dict())
        return 0.0
    if reason := too_old():
        raise InputError(reason)
    program = Program(model).eval()
    given = examples(model, EXAMPLES)
    size = torch.export.Dim("examples", min=1)
    dynamic = (tuple({0: size} for _ in given),)
    write = _onnx if form == "onnx" else _program
    with replacing(path) as temporary, _quiet():
        run = write(program, given, dynamic, temporary)
        worst = 0.0
        for number in TRIED:
            tried = examples(model, number, seed=number)
            with torch.no_grad():
                expected = program(*tried)
            try:
                found = run(tried)
            except Exception as error:  # whatever a runtime raises
                text = f"the program of this network as {form} does not run: {in_one_line(error)}"
                raise InputError(text) from error
            scale = 1.0 if model.classes is not None else float(expected.abs().max()) or 1.0
            apart = (
                float((found - expected).abs().max()) / scale if found.shape == expected.shape else math.inf
            )
            if not apart <= CLOSE:  # nan is not
                raise InputError(
                    f"the program of this network as {form} gives other outputs than the network, {apart:.2g} apart"
                )
            worst = max(worst, apart)
    return worst


def too_old() -> str:
    """What to say where this torch exports no programs; else ""."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= OLDEST:
        return ""
    needed = ".".join(map(str, OLDEST))
    return f"programs are exported by torch >= {needed}, this is {torch.__version__}: weights by any"


def signature(inputs: Tree) -> dict[str, dict[str, Any]]:
    """What the inputs are, JSON-able: the shape of one example and the dtype, by key, "" for a tensor that is alone."""
    found = {"": inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(found, dict):
        raise InputError("inputs of a run are a tensor or a dict of tensors")
    return {
        key: {"shape": list(each.shape[1:]), "dtype": str(each.dtype).removeprefix("torch.")}
        for key, each in found.items()
    }


def examples(model: AdaptedModel, number: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of a model, as a `Program` takes them."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for key, own in model.facts["inputs"].items():
        shape, dtype = (number, *own["shape"]), getattr(torch, own["dtype"])
        if isinstance(model.intake, Pictures):
            shape = (number, model.intake.channels, model.intake.height, model.intake.width)
            found.append(torch.randint(256, shape, generator=random, dtype=torch.uint8))
        elif not dtype.is_floating_point:
            categories = getattr(model.intake, "categories", {}).values()
            found.append(
                torch.randint(min(map(len, categories), default=2), shape, generator=random, dtype=dtype)
            )
        else:
            standard = model.scaling.inputs.get(f"[{key!r}]" if key else "")
            drawn = torch.randn(shape, generator=random, dtype=dtype)
            found.append(drawn if standard is None else standard.unscaled(drawn))
    return tuple(found)


Run = Callable[[tuple[Tensor, ...]], Tensor]


def _program(program: nn.Module, given: tuple[Tensor, ...], dynamic: Any, path: Path) -> Run:
    try:
        exported = torch.export.export(program, given, dynamic_shapes=dynamic)
        torch.export.save(exported, path)
        again = torch.export.load(path).module()
    except Exception as error:  # torch has its own for each construct of Python
        raise InputError(f"the network cannot be exported: {in_one_line(error)}") from error
    return lambda tried: again(*tried)


def _onnx(program: nn.Module, given: tuple[Tensor, ...], dynamic: Any, path: Path) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch needs it
    except ModuleNotFoundError as error:
        raise InputError(f"no {error.name}, which ONNX needs; pip install 'fomaml[export]'") from None
    names = [f"input{number}" if len(given) > 1 else "input" for number in range(len(given))]
    try:
        made = torch.onnx.export(
            program, given, dynamo=True, dynamic_shapes=dynamic, input_names=names, output_names=["output"],
            verbose=False,
        )  # fmt: skip
        assert made is not None  # as no file was named
        made.save(str(path), include_initializers=True, external_data=False)
    except Exception as error:
        raise InputError(f"the network cannot be exported: {in_one_line(error)}") from error
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])

    def run(tried: tuple[Tensor, ...]) -> Tensor:
        [found] = session.run(None, {name: each.numpy() for name, each in zip(names, tried)})
        return torch.from_numpy(np.asarray(found))

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it the exporters of torch say nothing."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
