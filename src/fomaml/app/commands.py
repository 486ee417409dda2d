"""The options of the commands beside `train`: plain dataclasses, as in config.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fomaml.app.resolve import resolve
from fomaml.app.settings import TrainConfig
from fomaml.errors import InputError, positive


@dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """Train several algorithms with the same budget, and judge them on the same unseen tasks.

    The budget is in outer iterations (by default the source's) or in seconds of training each; all see the
    same tasks from the same start. Writes one table, and a run directory for each algorithm.

    Example: fomaml compare sinusoid --algorithms fomaml maml reptile anil --seconds 60
    """

    out: Path | None = None
    """The folder to write; by default a new one under out/."""
    algorithm: Annotated[str | None, tyro.conf.Suppress] = None
    preset: Annotated[str | None, tyro.conf.Suppress] = None
    resume: Annotated[Path | None, tyro.conf.Suppress] = None
    validate_every: Annotated[int | None, tyro.conf.Suppress] = 0
    validation_tasks: Annotated[int | None, tyro.conf.Suppress] = None
    patience: Annotated[int | None, tyro.conf.Suppress] = None
    checkpoint_every: Annotated[int, tyro.conf.Suppress] = 500
    baselines: Annotated[bool, tyro.conf.Suppress] = False
    test_inner_batch_size: Annotated[int | None, tyro.conf.Suppress] = None
    tasks_at_once: Annotated[int | None, tyro.conf.Suppress] = None
    compile: Annotated[bool, tyro.conf.Suppress] = False
    autocast: Annotated[str | None, tyro.conf.Suppress] = None
    test_steps: tuple[int, ...] = (0, 1, 5, 10, 20)
    """The numbers of inner steps to evaluate after; the last one is the headline figure."""
    algorithms: tuple[str, ...] = ("fomaml", "maml", "reptile", "anil")
    """The algorithms, as in train; fomaml, to which the others are compared, is always among them."""
    seconds: float | None = None
    """The seconds of training of each algorithm, instead of --iterations."""
    test_tasks: Annotated[int, tyro.conf.arg(name="tasks")] = 1000
    """The number of unseen tasks to evaluate on."""
    cosine_every: int | None = None
    """The iterations of FOMAML between two comparisons of its meta-gradient with MAML's; by default a tenth of all."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a run directory on unseen tasks.

    Example: fomaml evaluate out/digits --tasks 2000 --json
    Example: fomaml evaluate docs/results/NAME --data-root my/omniglot --query-shots 15 --statistics own support
    """

    run: tyro.conf.Positional[Path]
    """The run directory."""
    tasks: int | None = None
    """The number of tasks; by default as many as the run used."""
    steps: tuple[int, ...] | None = None
    """The numbers of inner steps, the last one for the headline figure; by default those of the run."""
    ways: int | None = None
    """N, the classes of a task, where the head is made of them (zero-head, proto-maml); by default the run's."""
    shots: int | None = None
    """K, the support examples per class (or per sinusoid); by default the run's."""
    query_shots: int | None = None
    """The query examples per class (or per sinusoid); by default those of the run's own test."""
    test_augment: str | None = None
    """none, or turns: each class of a task is turned by a random multiple of 90 degrees; by default as the run."""
    copies: int | None = None
    """Take each image so many times, as it is and moved by --jitter, and average a query image's outputs over them; by
    default as the run."""
    jitter: float | None = None
    """The strength of the small random affine maps of --copies; by default as the run."""
    weights: str = "best"
    """best, by validation, or last; the same where the run had no validation."""
    part: str = "test"
    """The classes: test, or validation, which the run's weights were selected by."""
    seed: int | None = None
    """The seed of the tasks; by default the run's, and so the same tasks."""
    data_root: Path | None = None
    """The data's folder, as in train; by default the run's."""
    statistics: tuple[str, ...] | None = None
    """Whose examples batch norms normalise by: own, support or with-query, see train; several may be given, with a
    warning where the first two differ by more than the interval. By default as the run's own test."""
    balanced: bool = False
    """Take it for known that a task's query set holds as many examples of each class, and scale the outputs to it:
    more than the published figures know."""
    device: str | None = None
    """cpu, cuda, cuda:N or mps; by default the run's."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class PresetsConfig:
    """List the published settings that `fomaml train --preset NAME` knows, and the figure each aims at.

    Example: fomaml presets --json
    """

    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object with every setting instead of a table."""


@dataclass(frozen=True)
class CheckConfig:
    """Try a module of your own; exits with status 1 if something would be silently wrong.

    Example: fomaml check torchvision.models:resnet18 --input 3 32 32
    """

    module: tyro.conf.Positional[str]
    """package.module:factory or file.py:factory, a class, a function without arguments or a module; without
    :factory, the only one there."""
    input: tuple[int, ...]
    """The shape of one input, without the axis of the examples."""
    input_dtype: str = "float32"
    """float32, or int64 for token numbers below --vocabulary."""
    vocabulary: int | None = None
    """The number of different tokens in int64 inputs."""
    ways: int = 5
    """N, the classes of a task."""
    shots: int = 2
    """K, the support examples per class."""
    query_shots: int = 3
    """The query examples per class."""
    inner_steps: int = 3
    """The number of inner steps."""
    inner_lr: float = 0.01
    """The step size alpha of the inner loop."""
    seed: int = 0
    """The seed of weights and inputs."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object instead of text."""


def expand(config: CompareConfig) -> list[TrainConfig]:
    """The resolved settings of each algorithm of a comparison, FOMAML's first.

    Raises:
        InputError: as `resolve`, or a budget that is not positive or given twice.
    """
    if config.seconds is not None:
        positive("seconds", config.seconds)
        if config.iterations is not None:
            raise InputError(
                f"the budget is --iterations {config.iterations} or --seconds {config.seconds:g}, not both"
            )
    if config.cosine_every is not None:
        positive("cosine_every", config.cosine_every, integer=True)
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    names = dict.fromkeys(("fomaml", *config.algorithms))  # each once
    return [resolve(TrainConfig(**{**shared, "algorithm": name})) for name in names]
