"""The options of every command: what may be given. What becomes of it: settle.py. Groups of them: *_options.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.data_options import DATA_ROOT, SOURCE, DataOptions, TaskOptions
from fomaml.app.evaluation_options import EvaluateOptions, EvaluationOptions, MachineOptions
from fomaml.app.group_options import GroupOptions
from fomaml.app.learner_options import MODEL_WEIGHTS, AlgorithmOptions, InnerOptions, OuterOptions
from fomaml.app.named import OWN
from fomaml.app.networks import NETWORKS
from fomaml.app.parser import group, option, positional
from fomaml.app.settings import Better

__all__ = [
    "CheckOptions",
    "CompareOptions",
    "EvaluateOptions",
    "PresetsOptions",
    "TrainOptions",
    "given",
    "headings",
]


@dataclass(frozen=True)
class RunOptions:
    """What every training is made of."""

    source: str = positional(SOURCE, "", metavar="SOURCE")
    ways: int | None = option(
        "N, the classes of a task (default: 5); of groups of rows so many are drawn and numbered anew in each task "
        "(default: all classes of the data, under their own numbers)"
    )
    shots: int | None = option(
        "K, the support examples per class (default: 1; of groups of rows 5), or per task of regression (sinusoids: 10)"
    )
    model: str | None = option(
        "the network: FILE.py:NAME or package.module:NAME, a class or a function of your own; timm:NAME or "
        "torchvision:NAME; or mlp (784-256-10 on images, 1-40-40-1 on sinusoids, two layers of 64 on rows, with "
        "embeddings of categories; default for mnist, tables and arrays), conv4 (default for folder), conv4-strided "
        "(mean over space; default for omniglot), conv4-strided-flat (Reptile's), conv1d (convolutions over time; "
        "default for windows) or gru",
        choices=(*NETWORKS, *OWN),
    )
    iterations: int | None = option("the number of outer steps; default: the source's")
    data_root: Path | None = option(DATA_ROOT)
    out: Path | None = option("the folder to write; default: a new one under out/")
    data: DataOptions = group(DataOptions)
    rows: GroupOptions = group(GroupOptions)
    tasks: TaskOptions = group(TaskOptions)
    network: AlgorithmOptions = group(AlgorithmOptions)
    inner: InnerOptions = group(InnerOptions)
    outer: OuterOptions = group(OuterOptions)
    evaluation: EvaluationOptions = group(EvaluationOptions)
    machine: MachineOptions = group(MachineOptions)


@dataclass(frozen=True)
class TrainOptions(RunOptions):
    """Meta-train on a source and write a run directory.

    Options that are left out take the value of the preset, else of the algorithm, else of the source, else the default;
    --dry-run shows which. config.json in the run directory records every value.

    Example: fomaml train mnist --question new-labels --shots 1 --out out/digits
    Example: fomaml train folder:my/photos --image-size 84 84 --rgb --ways 3
    Example: fomaml train table:my/machines.csv --task machine --target wear --order hour
    Example: fomaml train --preset fomaml-omniglot-5w1s --data-root my/omniglot
    """

    algorithm: str | None = option("the algorithm (default: fomaml)", choices=tuple(ALGORITHMS))
    preset: str | None = option("a published setting, see `fomaml presets`; any option beside it wins")
    resume: Path | None = option(
        "finish this run directory, with its own settings; no other option goes with it, but --model, --loss and "
        "--metric again where they are your own code"
    )
    log: tuple[str, ...] | None = option(
        "where measurements go beside metrics.jsonl: tensorboard (event files in the run directory), or FILE.py:NAME, "
        "a class of your own that is made with (run directory, iterations done) and has write(record) and close()",
        metavar="LOG",
    )
    accept_changed_code: bool = option(
        "with --resume: go on with code of your own that is not what the run began with", False
    )
    dry_run: bool = option("print the settings and where each came from, and do nothing", False)


@dataclass(frozen=True)
class CompareOptions(RunOptions):
    """Train several algorithms with the same budget, and judge them on the same unseen tasks.

    The budget is a number of outer steps, or of seconds of training each; all see the same tasks, from the same start.
    Writes one table, and a run directory for each algorithm: with --iterations the one that `fomaml train` writes with
    the same options.

    Example: fomaml compare sinusoid --algorithms fomaml maml reptile anil --seconds 60
    """

    algorithms: tuple[str, ...] = option(
        "the algorithms (default: fomaml maml reptile anil); fomaml, from which differences are taken, is always among "
        "them",
        ("fomaml", "maml", "reptile", "anil"),
        choices=tuple(ALGORITHMS),
    )
    cosine_every: int | None = option(
        "the outer steps of FOMAML between two comparisons of its meta-gradient with MAML's; default: a tenth of all"
    )
    resume: Path | None = option("go on with the comparison in this folder, with its options", metavar="DIR")


@dataclass(frozen=True)
class PresetsOptions:
    """List the published settings that `fomaml train --preset NAME` takes, and the figure each aims at.

    Example: fomaml presets --json
    """

    json: bool = option("print one JSON object with every setting instead of a table", False)


@dataclass(frozen=True)
class CheckOptions:
    """Try a module of your own; the exit status is 1 if something would be silently wrong.

    Example: fomaml check torchvision.models:resnet18 --input 3 32 32
    """

    module: str = positional(
        "package.module:NAME or FILE.py:NAME, a class, a function or a module, without :NAME the only one there; "
        "timm:NAME or torchvision:NAME",
        metavar="MODULE",
    )
    input: tuple[int, ...] = option(
        "the shape of one input, without the axis of the examples", dataclasses.MISSING
    )
    model_options: tuple[str, ...] | None = option(
        "what it is called with, each key=value, as in `fomaml train`", metavar="KEY=VALUE"
    )
    model_weights: str | None = option(MODEL_WEIGHTS, metavar="FILE")
    loss: str | None = option("a loss of your own, as in `fomaml train`")
    output: str | None = option("what of its outputs is judged, as in `fomaml train`")
    metric: tuple[str, ...] | None = option("metrics to try, as in `fomaml train`")
    metric_direction: Better | None = option("as in `fomaml train`")
    input_dtype: Literal["float32", "int64"] = option(
        "float32 (default), or int64 for token numbers below --vocabulary", "float32"
    )
    vocabulary: int | None = option("the number of different tokens in int64 inputs")
    ways: int = option("N, the classes of a task (default: 5)", 5)
    shots: int = option("K, the support examples per class (default: 2)", 2)
    query_shots: int = option("the query examples per class (default: 3)", 3)
    inner_steps: int = option("the number of inner steps (default: 3)", 3)
    inner_lr: float = option("the step size alpha of the inner loop (default: 0.01)", 0.01)
    seed: int = option("the seed of weights and inputs (default: 0)", 0)
    json: bool = option("print one JSON object instead of text", False)


def given(options: Any) -> dict[str, Any]:
    """The options that were given, by name, out of all groups: those that are not at their field's default."""
    return dict(_given(options))


def headings(kind: type) -> dict[str, list[str]]:
    """The names of the options under each heading of a command, "" for those that stand before the first one."""
    found: dict[str, list[str]] = {"": []}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default_factory):
            nested: Any = field.default_factory
            found[(nested.__doc__ or "").rstrip(".")] = [each.name for each in dataclasses.fields(nested)]
        else:
            found[""].append(field.name)
    return found


def _given(options: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _given(value)
        elif value != field.default:
            yield field.name, value
