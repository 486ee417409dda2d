"""The settings of a run. Plain dataclasses; the library itself takes keyword arguments and knows nothing of these."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fomaml.errors import InputError, positive

SOURCES = ("mnist", "omniglot", "folder:PATH", "sinusoid")
SPLITS = ("maml", "vinyals", "background-evaluation")
QUESTIONS = ("new-labels", "new-digits")
ALGORITHMS = (
    *("fomaml", "maml", "reptile", "anil", "boil", "meta-sgd", "maml++", "imaml", "cavia", "sign-maml"),
    *("zero-head", "proto-maml"),
)
CLASSIFIERS = ("zero-head", "proto-maml")  # their heads are made of classes
MODELS = ("mlp", "conv4", "conv4-strided")
AUGMENTATIONS = ("none", "rotations", "warps")
SCHEDULES = ("constant", "cosine")
ENGINES = ("auto", "loop", "batched", "factored")
STATISTICS = ("own", "inductive", "both")

# What an option that is not given takes, by source and question, then by number of shots (the
# nearest below counts). How the MNIST ones were found: docs/LOG.md.
RECIPES: dict[tuple[str, str], dict[int, dict]] = {
    ("mnist", "new-labels"): {
        1: {"inner_lr": 0.05, "inner_steps": 5, "meta_lr": 5e-3, "iterations": 1000},
        5: {"inner_lr": 0.05, "inner_steps": 5, "meta_lr": 5e-3, "iterations": 800},
    },
    ("mnist", "new-digits"): {
        1: {
            "inner_lr": 0.05,
            "inner_steps": 5,
            "meta_batch_size": 32,
            "iterations": 500,
            "schedule": "constant",
            "augment": "rotations",
        },
        5: {"inner_lr": 0.02, "inner_steps": 10, "iterations": 400, "augment": "warps"},
    },
    ("omniglot", ""): {
        1: {
            "model": "conv4-strided",
            "inner_lr": 0.4,
            "inner_steps": 3,
            "meta_lr": 2e-3,
            "query_shots": 5,
            "iterations": 2000,
            "augment": "rotations",
            "split": "maml",
        },
    },
    ("folder", ""): {
        1: {"model": "conv4", "inner_lr": 0.05, "inner_steps": 5, "iterations": 2000},
    },
    ("sinusoid", ""): {
        1: {"inner_lr": 0.01, "inner_steps": 1, "iterations": 15000, "meta_batch_size": 25},
    },
}
COMMON = {"meta_lr": 1e-3, "meta_batch_size": 16, "augment": "none", "schedule": "cosine"}

# What an algorithm takes instead, by kind of task; `choices` are further arguments of its preset. Found on short
# runs (sinusoid: 800 to 4 000 iterations; MNIST, new-labels, 1 shot: 80 to 150). On sinusoids Reptile with inner_lr
# 0.02 and 10 or more steps gave nan. MAML at FOMAML's meta_lr of 5e-3 on MNIST: 57 % instead of 81 %. CAVIA stayed at
# chance on MNIST with every inner_lr from 1 to 30, first and second order, context at the pixels or at a hidden layer.
ALGORITHM_RECIPES: dict[tuple[str, str], dict] = {
    ("regression", "reptile"): {"inner_lr": 0.01, "inner_steps": 10, "meta_lr": 1.0},
    ("regression", "anil"): {"inner_lr": 0.01, "inner_steps": 5},
    ("regression", "boil"): {"inner_lr": 0.01, "inner_steps": 5},
    ("regression", "meta-sgd"): {"inner_lr": 0.01, "inner_steps": 5},
    ("regression", "maml++"): {"inner_lr": 0.01, "inner_steps": 5},
    ("regression", "imaml"): {
        "inner_lr": 0.005,
        "inner_steps": 16,
        "meta_lr": 3e-4,  # 1e-3: nan after 2500 to 3400 iterations
        "choices": {"strength": 0.5, "cg_steps": 5, "damping": 100.0},  # without damping: nan after 1200
    },
    ("regression", "cavia"): {"inner_lr": 1.0, "inner_steps": 1},  # the paper's
    ("regression", "sign-maml"): {"inner_lr": 0.003, "inner_steps": 10},
    ("classification", "reptile"): {"meta_lr": 1.0},
    ("classification", "maml"): {"meta_lr": 1e-3},
    ("classification", "anil"): {"inner_lr": 0.2, "meta_lr": 1e-3},
    ("classification", "boil"): {"inner_lr": 0.1, "meta_lr": 1e-3},
    ("classification", "meta-sgd"): {"meta_lr": 1e-3},
    ("classification", "maml++"): {"meta_lr": 1e-3},
    ("classification", "imaml"): {
        "inner_steps": 10,
        "meta_lr": 1e-3,
        "choices": {"strength": 0.5, "cg_steps": 2},
    },
    ("classification", "cavia"): {"inner_lr": 1.0},
    ("classification", "sign-maml"): {"inner_lr": 0.002},
    ("classification", "proto-maml"): {"inner_lr": 0.01, "meta_lr": 1e-3},  # 0.05: down to chance
}


@dataclass(frozen=True)
class TrainConfig:
    """Meta-train on a source and write a run directory.

    Options left out take the source's recipe; the run directory's config.json records every value.

    Example: fomaml train mnist --question new-labels --shots 1 --out out/digits
    """

    source: tyro.conf.Positional[str] = ""
    """Where tasks come from: mnist, omniglot, folder:PATH (one directory of images per class) or sinusoid."""
    out: Path | None = None
    """The run directory to write; by default a new one under out/."""
    algorithm: str = "fomaml"
    """fomaml, maml, reptile, anil, boil, meta-sgd, maml++, imaml, cavia, sign-maml, zero-head or proto-maml."""
    question: str | None = None
    """For mnist: new-labels (all ten digits, labels shuffled in each task; the default) or new-digits (meta-train on
    0-4, meta-test on 5-9)."""
    model: str | None = None
    """mlp (784-256-10 on images, 1-40-40-1 on sinusoids; the default), conv4 or conv4-strided."""
    data_root: Path | None = None
    """The data's folder: MNIST/raw/*-ubyte, or Omniglot's archives; by default torchvision's download, or MNIST-5k
    without a network."""
    split: str | None = None
    """For omniglot: maml (1100, 100 and 423 characters; the default), vinyals or background-evaluation."""
    image_size: tuple[int, int] | None = None
    """For folder: height and width to resize to; by default as they are."""
    rgb: bool = False
    """For folder: three colours instead of grey."""
    ways: int = 5
    """N, the classes of a task."""
    shots: int | None = None
    """K, the support examples per class (1 by default), or per sinusoid (10)."""
    query_shots: int | None = None
    """The query examples per class, or per sinusoid (10)."""
    inner_lr: float | None = None
    """The step size alpha of the inner loop."""
    inner_steps: int | None = None
    """The number of inner steps in training."""
    meta_lr: float | None = None
    """The step size of Adam in the outer loop (of SGD for reptile)."""
    meta_batch_size: int | None = None
    """The tasks of one outer step."""
    iterations: int | None = None
    """The number of outer steps."""
    schedule: str | None = None
    """The meta_lr over the iterations: constant or cosine."""
    augment: str | None = None
    """Further training classes made of the given ones: none, rotations or warps (600 pseudo-characters)."""
    test_tasks: int = 1000
    """The number of unseen tasks to evaluate on."""
    test_steps: tuple[int, ...] = (0, 1, 5, 10, 20)
    """The numbers of inner steps to evaluate after; the last one is the headline figure."""
    baselines: bool = True
    """Evaluate baselines on the same tasks."""
    engine: str = "auto"
    """How a meta-batch is computed: auto, loop, batched or factored."""
    seed: int = 0
    """The seed of weights and tasks."""
    device: str = "cpu"
    """cpu, cuda, cuda:N or mps."""
    checkpoint_every: int = 500
    """The outer steps between two checkpoints; a run that was killed goes on from the last one."""
    resume: Path | None = None
    """A run directory to finish, with its own settings; no other option goes with it."""
    image: Annotated[tuple[int, int, int] | None, tyro.conf.Suppress] = None
    """Channels, height and width of the images, as the data has them."""
    choices: Annotated[dict[str, float] | None, tyro.conf.Suppress] = None
    """Further arguments of the algorithm; by default its recipe's."""


@dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """Train several algorithms with the same budget, and judge them on the same unseen tasks.

    The budget is in outer iterations (by default the source's) or in seconds of training each; all see the
    same tasks from the same start. Writes one table, and a run directory for each algorithm.

    Example: fomaml compare sinusoid --algorithms fomaml maml reptile anil --seconds 60
    """

    out: Path | None = None
    """The folder to write; by default a new one under out/."""
    algorithm: Annotated[str, tyro.conf.Suppress] = "fomaml"
    baselines: Annotated[bool, tyro.conf.Suppress] = False
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
    """

    run: tyro.conf.Positional[Path]
    """The run directory."""
    tasks: int | None = None
    """The number of tasks; by default as many as the run used."""
    steps: tuple[int, ...] | None = None
    """The numbers of inner steps, the last one for the headline figure; by default those of the run."""
    seed: int | None = None
    """The seed of the tasks; by default the run's, and so the same tasks."""
    data_root: Path | None = None
    """A folder that holds MNIST/raw/*-ubyte; by default the run's."""
    statistics: str = "own"
    """Where batch norm takes its statistics from: own (as the model was trained), inductive (the support set, so
    that query examples do not inform each other), or both, with a warning where the two differ by more than the
    interval."""
    device: str | None = None
    """cpu, cuda, cuda:N or mps; by default the run's."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object instead of a table."""


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


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what was left out, and check every value that can be checked without data.

    Raises:
        InputError: an unknown name (the message lists the known ones) or a number that is not positive.
    """
    kind, _, path = config.source.partition(":")
    if (kind == "folder") != bool(path) or kind not in ("mnist", "omniglot", "folder", "sinusoid"):
        known("source", config.source, SOURCES)
    known("algorithm", config.algorithm, ALGORITHMS)
    sinusoid = kind == "sinusoid"
    question = config.question or ""
    if kind == "mnist":
        question = question or "new-labels"
        known("question", question, QUESTIONS)
    elif question:
        raise InputError(f"the source {kind} has no question, got {question!r}")
    shots = (10 if sinusoid else 1) if config.shots is None else config.shots
    positive("shots", shots, integer=True)
    recipes = RECIPES[kind, question]
    recipe = recipes[max(k for k in recipes if k <= shots)]
    defaults = {**COMMON, "model": "mlp", "query_shots": 10, **recipe}
    defaults |= ALGORITHM_RECIPES.get(("regression" if sinusoid else "classification", config.algorithm), {})
    given = {k: v for k, v in vars(config).items() if v is not None}
    config = TrainConfig(**{**defaults, **given, "question": question, "shots": shots})
    if kind == "omniglot":
        known("split", config.split, SPLITS)
    elif config.split is not None:
        raise InputError(f"the source {kind} has no named splits, got {config.split!r}")
    known("model", config.model, MODELS)
    known("augment", config.augment, AUGMENTATIONS)
    known("schedule", config.schedule, SCHEDULES)
    known("engine", config.engine, ENGINES)
    if sinusoid and config.model != "mlp":
        raise InputError(f"the source sinusoid goes with the model mlp, got {config.model!r}")
    if sinusoid and config.algorithm in CLASSIFIERS:
        raise InputError(f"the algorithm {config.algorithm} needs classes: the source sinusoid has none")
    if config.algorithm == "cavia" and config.model != "mlp":
        raise InputError(f"the algorithm cavia goes with the model mlp, got {config.model!r}")
    for name in (
        "ways",
        "query_shots",
        "inner_steps",
        "meta_batch_size",
        "iterations",
        "test_tasks",
        "checkpoint_every",
    ):
        positive(name, getattr(config, name), integer=True)
    for name in ("inner_lr", "meta_lr"):
        positive(name, getattr(config, name))
    check_steps(config.test_steps)
    return config


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


def check_steps(steps: tuple[int, ...]) -> None:
    """Raise `InputError` unless these are ascending whole numbers of 0 or more."""
    if not steps or min(steps) < 0 or list(steps) != sorted(set(steps)):
        raise InputError(f"test steps must be ascending whole numbers of 0 or more, got {list(steps)}")


def known(what: str, name: str, names: tuple[str, ...]) -> None:
    """Raise `InputError` unless `name` is one of `names`."""
    if name not in names:
        raise InputError(f"unknown {what} {name!r}; there are: {', '.join(names)}")


def to_json(config: TrainConfig) -> str:
    """The config as an indented JSON object."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str, origin: str) -> TrainConfig:
    """Read `to_json` back.

    Raises:
        InputError: not the JSON of a run's config; `origin` says where it was read.
    """
    try:
        values = json.loads(text)
        for name in ("out", "data_root"):
            values[name] = values[name] and Path(values[name])
        for name in ("test_steps", "image", "image_size"):
            values[name] = values[name] and tuple(values[name])
        return TrainConfig(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{origin} is not the config of a run ({error})") from None
