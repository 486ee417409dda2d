"""The options of every command: what may be given. What becomes of it: settle.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fomaml.app.algorithms import ALGORITHMS, ANY_WAYS
from fomaml.app.build import NETWORKS
from fomaml.app.parser import group, option, positional
from fomaml.app.settings import (
    Adapted,
    Augmentation,
    BaselineSize,
    Filter,
    InnerLoss,
    InnerOptimizer,
    LearnedRates,
    NormParameters,
    NormPolicy,
    Part,
    Precision,
    Question,
    Schedule,
    Split,
    TestAugmentation,
    Weights,
)
from fomaml.app.sources import names
from fomaml.choices import Statistics
from fomaml.engines import ENGINES

SOURCE = f"where tasks come from: {', '.join(names())}; PATH holds one directory of images per class"
DATA_ROOT = (
    "the folder of the data: MNIST/raw/*-ubyte, or the archives of Omniglot; default: torchvision's download, or "
    "MNIST-5k without a network"
)


@dataclass(frozen=True)
class DataOptions:
    """Data."""

    question: Question | None = option(
        "for mnist: new-labels (all ten digits, labels shuffled in each task; default) or new-digits (meta-train on "
        "0-4, meta-test on 5-9)"
    )
    split: Split | None = option(
        "for omniglot: maml (1100, 100 and 423 characters; default), vinyals or background-evaluation"
    )
    resize: Filter | None = option(
        "for omniglot: the filter that shrinks the drawings (default: lanczos); nearest is what the original MAML code "
        "got"
    )
    image_size: tuple[int, int] | None = option(
        "for folder: the height and width to resize images to; default: as they are", metavar="PIXELS"
    )
    rgb: bool = option("for folder: keep the three colours instead of grey", False)
    shares: tuple[float, float, float] | None = option(
        "for folder: the shares of its classes for training, validation and test, where it has no directories that say "
        "so (default: 0.6 0.2 0.2); 0 for no validation",
        metavar="SHARE",
    )
    skip_small_classes: bool = option(
        "for folder: leave out classes with fewer images than a task takes, instead of refusing them", False
    )
    augment: Augmentation | None = option(
        "further training classes made of those there are: none (default), rotations (each class turned by 90, 180 and "
        "270 degrees is another class), turns (each class of a task is turned by a random one of these, anew in each "
        "task) or warps (600 pseudo-characters)"
    )
    jitter: float | None = option(
        "move each training image by a small random affine map of this strength: 0 for none (default), 0.1 for up to "
        "6 degrees and 10 % of stretch"
    )


@dataclass(frozen=True)
class TaskOptions:
    """Tasks."""

    query_shots: int | None = option("the query examples per class, or per sinusoid (default: 10)")
    train_ways: int | None = option(
        f"the classes of a training task, with {' or '.join(ANY_WAYS)}; default: as --ways"
    )
    train_shots: int | None = option("the support examples per class of a training task; default: as --shots")
    test_query_shots: int | None = option(
        "the query examples per class of a validation or test task; default: as --query-shots"
    )
    test_augment: TestAugmentation | None = option(
        "turn each class of a validation or test task by a random multiple of 90 degrees: none (default) or turns"
    )
    test_copies: int | None = option(
        "take each image of a validation or test task so many times, as it is and moved by the jitter of the test, and "
        "average the outputs of a query image over its copies (default: 1)"
    )
    test_jitter: float | None = option("the jitter of these copies; default: as --jitter")


@dataclass(frozen=True)
class AlgorithmOptions:
    """Algorithm and network."""

    channels: tuple[int, ...] | None = option(
        "the channels of the convolutions: one number for all (default: 64), or one for each of the four"
    )
    norm_policy: NormPolicy | None = option(
        "what a batch norm normalises by: batch (default; transductive), support, running or per-step"
    )
    norm_parameters: NormParameters | None = option(
        "what a batch norm learns: scale-shift (gamma and beta; default) or shift (beta alone, as in the original MAML "
        "code)"
    )
    adapt: Adapted | None = option(
        "what the inner loop moves: all that the algorithm adapts (default), or no-norm, all but the parameters of "
        "batch norms, which are then only meta-learned (as in the original MAML code)"
    )
    learn_rates: LearnedRates | None = option(
        "learn the inner step sizes too, starting at --inner-lr: none (default), per-step (one per tensor and inner "
        "step) or elementwise"
    )
    rates_lr: float | None = option("the meta_lr of learned step sizes; default: --meta-lr times --inner-lr")
    multi_step_iterations: int | None = option(
        "weigh the query losses of all inner steps, annealed to the last step over so many outer steps"
    )


@dataclass(frozen=True)
class InnerOptions:
    """Inner loop."""

    inner_lr: float | None = option("the step size alpha")
    inner_steps: int | None = option("the number of inner steps in training")
    inner_loss: InnerLoss | None = option(
        "mean (default) over the support examples, or summed: divided by the shots only, as in the original MAML code, "
        "where the step size acts as N times alpha"
    )
    inner_optimizer: InnerOptimizer | None = option(
        "sgd (default), adam, or carried-adam, whose second moments outlive a task (as in Reptile's code)"
    )
    inner_momentum: float | None = option("the momentum of sgd, or beta1 of adam (default: 0)")
    inner_batch_size: int | None = option(
        "take each inner step on a mini-batch of the support set; default: on all of it"
    )
    test_inner_batch_size: int | None = option(
        "the same in validation and test; default: as --inner-batch-size"
    )


@dataclass(frozen=True)
class OuterOptions:
    """Outer loop."""

    meta_lr: float | None = option("the step size of Adam (of SGD for reptile)")
    meta_batch_size: int | None = option("the tasks of one outer step")
    seconds: float | None = option(
        "train for so many seconds instead of --iterations; such a run cannot be repeated bit for bit"
    )
    schedule: Schedule | None = option("the meta_lr over the training: constant, cosine or linear (to zero)")
    weight_decay: float | None = option("the weight decay, decoupled in Adam (default: 0)")
    clip: float | None = option(
        "the largest norm of the meta-gradient; a longer one is scaled down to it; default: no limit"
    )
    validate_every: int | None = option(
        "the outer steps between two validations, 0 for none; default: a tenth of the iterations where the source has "
        "validation classes. weights.safetensors then holds the best weights, last.safetensors the last"
    )
    validation_tasks: int | None = option(
        "the number of validation tasks, the same each time (default: 200; fewer in a run shorter than the source's "
        "default)"
    )
    patience: int | None = option("stop after so many validations without a better one; default: never")
    checkpoint_every: int | None = option(
        "the outer steps between two checkpoints, from which a killed run goes on (default: 500)"
    )


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluation."""

    test_tasks: int | None = option("the number of unseen tasks (default: 1000)")
    test_steps: tuple[int, ...] | None = option(
        "the numbers of inner steps to evaluate after (default: 0 1 5 10 20); the last one gives the headline figure "
        "and counts in validation"
    )
    statistics: Statistics | None = option(
        "whose examples batch norms normalise by in validation and test: own (as --norm-policy says; default), support "
        "(the support set, so that query examples do not inform each other) or with-query (the support set and one "
        "query example at a time, as the published code of Reptile tests)"
    )
    baselines: bool = option("evaluate baselines on the same tasks", True)
    baseline_size: BaselineSize | None = option(
        "how many tasks baselines are tuned and tested on: run (default), in a run shorter than the source's default "
        "so many that validation and baselines take about as long as the training at most; or full, whatever the run"
    )


@dataclass(frozen=True)
class MachineOptions:
    """Machine."""

    engine: str | None = option("how a meta-batch is computed (default: auto)", choices=("auto", *ENGINES))
    tasks_at_once: int | None = option(
        "at most so many tasks in memory at a time; default: what suits the engine"
    )
    compile: bool = option(
        "compile the meta-gradient: seconds to a minute at the start, faster steps after it", False
    )
    autocast: Precision | None = option(
        "the precision of forward passes in training: none (that of the weights; default), bfloat16, or auto (bfloat16 "
        "where the device has instructions for it)"
    )
    seed: int | None = option("the seed of weights and tasks (default: 0)")
    device: str | None = option("cpu (default), cuda, cuda:N or mps")


@dataclass(frozen=True)
class RunOptions:
    """What every training is made of."""

    source: str = positional(SOURCE, "", metavar="SOURCE")
    ways: int | None = option("N, the classes of a task (default: 5)")
    shots: int | None = option(
        "K, the support examples per class (default: 1), or per sinusoid (default: 10)"
    )
    model: str | None = option(
        "the network: mlp (784-256-10 on images, 1-40-40-1 on sinusoids; default for mnist), conv4 (default for "
        "folder), conv4-strided (mean over space; default for omniglot) or conv4-strided-flat (Reptile's)",
        choices=tuple(NETWORKS),
    )
    iterations: int | None = option("the number of outer steps; default: the source's")
    data_root: Path | None = option(DATA_ROOT)
    out: Path | None = option("the folder to write; default: a new one under out/")
    data: DataOptions = group(DataOptions)
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
    Example: fomaml train --preset fomaml-omniglot-5w1s --data-root my/omniglot
    """

    algorithm: str | None = option("the algorithm (default: fomaml)", choices=tuple(ALGORITHMS))
    preset: str | None = option("a published setting, see `fomaml presets`; any option beside it wins")
    resume: Path | None = option(
        "finish this run directory, with its own settings; no other option goes with it"
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


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a run directory on unseen tasks.

    Example: fomaml evaluate out/digits --tasks 2000 --json
    Example: fomaml evaluate docs/results/NAME --data-root my/omniglot --query-shots 15 --statistics own support
    """

    run: Path = positional("the run directory", metavar="RUN")
    tasks: int | None = option("the number of tasks; default: as the run")
    steps: tuple[int, ...] | None = option(
        "the numbers of inner steps, the last one for the headline figure; default: as the run"
    )
    ways: int | None = option(f"N, the classes of a task, with {' or '.join(ANY_WAYS)}; default: as the run")
    shots: int | None = option("K, the support examples per class, or per sinusoid; default: as the run")
    query_shots: int | None = option(
        "the query examples per class, or per sinusoid; default: as the run's test"
    )
    test_augment: TestAugmentation | None = option(
        "none, or turns: each class of a task is turned by a random multiple of 90 degrees; default: as the run"
    )
    copies: int | None = option(
        "take each image so many times, as it is and moved by --jitter, and average the outputs of a query image over "
        "its copies; default: as the run"
    )
    jitter: float | None = option(
        "the strength of the small random affine maps of --copies; default: as the run"
    )
    statistics: tuple[Statistics, ...] | None = option(
        "whose examples batch norms normalise by: own, support or with-query, see `fomaml train`. Several may be "
        "given, with a warning where the first two differ by more than the interval. Default: as the run",
        choices=get_args(Statistics),
    )
    balanced: bool = option(
        "assume the same number of query examples per class, and scale the outputs to it; no published figure does",
        False,
    )
    weights: Weights = option("best (by validation; default) or last", "best")
    part: Part = option(
        "the classes: test (default), or validation, by which the weights were selected", "test"
    )
    seed: int | None = option("the seed of the tasks; default: as the run, which gives the same tasks")
    data_root: Path | None = option("the folder of the data, as in `fomaml train`; default: as the run")
    device: str | None = option("cpu, cuda, cuda:N or mps; default: as the run")
    json: bool = option("print one JSON object instead of a table", False)


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
        "package.module:NAME or FILE.py:NAME, a class, a function without arguments or a module; without :NAME, the "
        "only one there",
        metavar="MODULE",
    )
    input: tuple[int, ...] = option(
        "the shape of one input, without the axis of the examples", dataclasses.MISSING
    )
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
