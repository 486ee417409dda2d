"""The options of how a run is judged, and where it is computed; those of `fomaml evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from fomaml.app.algorithms import ANY_WAYS
from fomaml.app.parser import option, positional
from fomaml.app.settings import BaselineSize, Better, Compiled, Part, Precision, TestAugmentation, Weights
from fomaml.choices import Statistics
from fomaml.engines import ENGINES
from fomaml.metrics import METRICS

METRIC = (
    f"what is scored, {', '.join(METRICS)} or FILE.py:NAME, a function (outputs, targets) of one task, with --loss "
    "(forward, examples), or a fomaml.Metric. Of several the first one gives the headline figure and counts in "
    "validation. Default: the accuracy of classes, else the loss"
)


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluation."""

    metric: tuple[str, ...] | None = option(METRIC)
    metric_direction: Better | None = option("whether higher or lower is better of a function of your own")
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
    compile: Compiled | None = option(
        "compile the meta-gradient, seconds to a minute at the start and faster steps after it: auto (where the run is "
        "long enough for it, by a rule; default), yes or no"
    )
    autocast: Precision | None = option(
        "the precision of forward passes in training: none (that of the weights; default), bfloat16, or auto (bfloat16 "
        "where the device has instructions for it)"
    )
    same_bits: bool = option(
        "the same bits for any number of processes that torchrun starts, on one kind of processor: tasks are computed "
        "in pieces whose number they do not change, and added up in their order",
        False,
    )
    threads: int | None = option("with --same-bits: the threads of each process (default: 1)")
    seed: int | None = option("the seed of weights and tasks (default: 0)")
    device: str | None = option("cpu (default), cuda, cuda:N or mps")


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a run directory on unseen tasks, or an adapted model on labelled inputs.

    Example: fomaml evaluate out/digits --tasks 2000 --json
    Example: fomaml evaluate my/model --query my/labelled
    Example: fomaml evaluate docs/results/NAME --data-root my/omniglot --query-shots 15 --statistics own support
    """

    run: Path = positional("the run directory, or the folder of an adapted model", metavar="RUN")
    query: Path | None = option(
        "the labelled inputs to judge an adapted model on, as `fomaml adapt --support`"
    )
    moved_run: Path | None = option(
        "the run, where it has moved, of an adapted model that holds only what differs from it",
        metavar="RUN",
        name="run",
    )
    model: str | None = option(
        "the run's model again, where it is your own: nothing is imported unless you name it"
    )
    features_of: str | None = option("the run's --features-of again, where it is your own")
    features_weights: str | None = option("the file of its weights, where it has moved", metavar="FILE")
    loss: str | None = option("the run's loss again, where it is your own")
    metric: tuple[str, ...] | None = option("other metrics, as of `fomaml train`; default: as the run")
    metric_direction: Better | None = option("as of `fomaml train`")
    accept_changed_code: bool = option("take code of your own that is not what the run was made with", False)
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
    baselines: bool = option(
        "evaluate baselines on the same tasks, as `fomaml train` does; their networks are trained again (default: no)",
        False,
    )
    baseline_size: BaselineSize | None = option(
        "with --baselines: run or full, as of `fomaml train`; default: as the run"
    )
    model_weights: str | None = option(
        "with --baselines: the file of weights that the run began with, where it has moved", metavar="FILE"
    )
    weights: Weights = option("best (by validation; default) or last", "best")
    part: Part = option(
        "the classes: test (default), or validation, by which the weights were selected", "test"
    )
    seed: int | None = option("the seed of the tasks; default: as the run, which gives the same tasks")
    data_root: Path | None = option("where the run's data are by now")
    device: str | None = option("cpu, cuda, cuda:N or mps; default: as the run")
    json: bool = option("print one JSON object instead of a table", False)
