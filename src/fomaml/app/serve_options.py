"""The options of the commands that use what a run has learned: `fomaml adapt`, `predict` and others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fomaml.app.parser import option, positional
from fomaml.app.settings import Weights
from fomaml.serve.export import Form

RUN = "the directory of a finished run"
OWN_MODEL = "the model again, where it is code of your own: FILE.py:NAME or package.module:NAME"
CHANGED = "take code of your own that is not what the run was made with"
MOVED_RUN = "the run, where it has moved, of a model that holds only what differs from it"
DEVICE = "cpu (default), cuda, cuda:N or mps"


@dataclass(frozen=True)
class AdaptOptions:
    """Adapt a run to labelled examples of your own, and write the adapted model.

    The examples are what the run was trained on a kind of: for pictures a folder with a directory for each class, for a
    table a table with the target, for arrays and windows an .npz file. The classes are your own, as many as you like
    where the run's head is made of them (zero-head, proto-maml), else at most those of a training task.

    Example: fomaml adapt out/run --support my/examples --out my/model
    Example: fomaml adapt out/machines --support first-days.csv --out machine-12
    """

    run: Path = positional(RUN, metavar="RUN")
    support: Path = option("the labelled examples: a folder or a file", dataclasses.MISSING, metavar="PATH")
    out: Path = option("the folder to write", dataclasses.MISSING)
    steps: str | None = option(
        "the inner steps, or auto: as many as were best in validation; default: as many as the "
        "run's figure is of",
        metavar="N",
    )
    statistics: Literal["support", "own"] = option(
        "whose examples batch norms normalise by: support (the labelled examples, so that each input is judged alone; "
        "default), or own (the inputs that are judged together)",
        "support",
    )
    change_only: bool = option(
        "keep only the tensors that adaptation has changed: the model then needs the run where it is used",
        False,
    )
    weights: Weights = option("best by validation (default), or last", "best")
    model: str | None = option(OWN_MODEL)
    loss: str | None = option("the loss again, where it is code of your own")
    accept_changed_code: bool = option(CHANGED, False)
    device: str | None = option(DEVICE)


@dataclass(frozen=True)
class PredictOptions:
    """Say what an adapted model makes of new inputs: a class with its probability, or a value.

    Example: fomaml predict my/model new.jpg folder/of/more
    Example: fomaml predict machine-12 later-days.csv --csv
    """

    model_folder: Path = positional("the folder that `fomaml adapt` has written", metavar="MODEL")
    inputs: tuple[Path, ...] = positional(
        "pictures or folders of them, a table, or a file of arrays", metavar="INPUT"
    )
    json: bool = option("print one JSON object a line", False)
    csv: bool = option("print comma-separated values", False)
    moved_run: Path | None = option(MOVED_RUN, metavar="RUN", name="run")
    model: str | None = option(OWN_MODEL)
    accept_changed_code: bool = option(CHANGED, False)
    device: str = option(DEVICE, "cpu")


@dataclass(frozen=True)
class ExportOptions:
    """Write an adapted model as a program for other runtimes, once its outputs are found to be the same.

    The scaling of inputs and outputs is in it: pictures are uint8 (examples, channels, height, width) of the run's
    size, rows are numbers in their own units; outputs are probabilities, or values in the targets' own units.

    Example: fomaml export my/model --to onnx --out model.onnx
    """

    model_folder: Path = positional("the folder that `fomaml adapt` has written", metavar="MODEL")
    to: Form = option(
        "onnx, torch-export (torch.export.load reads it), or safetensors (the weights alone)",
        dataclasses.MISSING,
    )
    out: Path | None = option("the file to write; default: MODEL/model with the form's suffix")
    moved_run: Path | None = option(MOVED_RUN, metavar="RUN", name="run")
    model: str | None = option(OWN_MODEL)
    accept_changed_code: bool = option(CHANGED, False)


@dataclass(frozen=True)
class CalibrateOptions:
    """Fit what a run's probabilities are worth, and which number of steps is best, on validation tasks.

    Writes calibration.json into the run; `fomaml adapt` takes the temperature of the ways and shots that are nearest.

    Example: fomaml calibrate out/run --shots 1 5
    """

    run: Path = positional(RUN, metavar="RUN")
    ways: tuple[int, ...] | None = option("the numbers of classes; default: the run's")
    shots: tuple[int, ...] | None = option("the numbers of examples per class; default: the run's, 1 and 5")
    tasks: int = option("the number of validation tasks of each (default: 100)", 100)
    weights: Weights = option("best by validation (default), or last", "best")
    data_root: Path | None = option("where the run's data are by now")
    model: str | None = option(OWN_MODEL)
    loss: str | None = option("the loss again, where it is code of your own")
    accept_changed_code: bool = option(CHANGED, False)
    device: str | None = option(DEVICE)


@dataclass(frozen=True)
class DemoOptions:
    """Show a run of pictures at work: a page for this machine alone, to draw on.

    Draw a few examples of each of your own symbols, or add pictures, press Adapt, and see what the run makes of another
    one before and after it has learned yours.

    Example: fomaml demo docs/results/omniglot_best
    Example: fomaml demo out/photos --save my/models
    """

    run: Path = positional(RUN, metavar="RUN")
    port: int = option("on 127.0.0.1 (default: 8765); 0 takes a free one", 8765)
    save: Path | None = option(
        "a folder to keep adapted models in, which the page then offers", metavar="FOLDER"
    )
    steps: str | None = option("as in `fomaml adapt`", metavar="N")
    weights: Weights = option("best by validation (default), or last", "best")
    model: str | None = option(OWN_MODEL)
    loss: str | None = option("the loss again, where it is code of your own")
    accept_changed_code: bool = option(CHANGED, False)
    device: str | None = option(DEVICE)
