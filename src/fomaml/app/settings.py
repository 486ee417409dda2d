"""The settings of a run. Plain dataclasses; the library itself takes keyword arguments and knows nothing of these."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import tyro

from fomaml.app.defaults import PLAIN
from fomaml.choices import Statistics
from fomaml.errors import InputError

SOURCES = ("mnist", "omniglot", "folder:PATH", "sinusoid")
SPLITS = ("maml", "vinyals", "background-evaluation")
FILTERS = ("lanczos", "nearest", "box", "bilinear")
QUESTIONS = ("new-labels", "new-digits")
ALGORITHMS = (
    *("fomaml", "maml", "reptile", "anil", "boil", "meta-sgd", "maml++", "imaml", "cavia", "sign-maml"),
    *("zero-head", "proto-maml"),
)
CLASSIFIERS = ("zero-head", "proto-maml")  # their heads are made of classes
MODELS = ("mlp", "conv4", "conv4-strided", "conv4-strided-flat")
NORM_POLICIES = ("batch", "support", "running", "per-step")
NORM_PARAMETERS = ("scale-shift", "shift")
ADAPTED = ("all", "no-norm")
INNER_LOSSES = ("mean", "summed")
INNER_OPTIMIZERS = ("sgd", "adam", "carried-adam")
LEARNED_RATES = ("none", "per-step", "elementwise")
AUGMENTATIONS = ("none", "rotations", "turns", "warps")
TEST_AUGMENTATIONS = ("none", "turns")
SCHEDULES = ("constant", "cosine", "linear")
PRECISIONS = ("none", "bfloat16", "auto")
ENGINES = ("auto", "loop", "batched", "factored")
STATISTICS = get_args(Statistics)
PARTS = ("test", "validation")
WEIGHTS = ("best", "last")
# What follows another option where it is not given.
FOLLOWING = (
    ("train_ways", "ways"),
    ("train_shots", "shots"),
    ("test_query_shots", "query_shots"),
    ("test_jitter", "jitter"),
    ("test_inner_batch_size", "inner_batch_size"),
)


@dataclass(frozen=True)
class TrainConfig:
    """Meta-train on a source and write a run directory.

    Options left out take those of the preset, else the source's recipe; the run directory's config.json records
    every value.

    Example: fomaml train mnist --question new-labels --shots 1 --out out/digits
    Example: fomaml train --preset fomaml-omniglot-5w1s --data-root my/omniglot
    """

    source: tyro.conf.Positional[str] = ""
    """Where tasks come from: mnist, omniglot, folder:PATH (one directory of images per class) or sinusoid."""
    preset: str | None = None
    """A published setting, see `fomaml presets`; any option given beside it wins."""
    out: Path | None = None
    """The run directory to write; by default a new one under out/."""
    resume: Path | None = None
    """A run directory to finish, with its own settings; no other option goes with it."""

    # --- tasks
    question: str | None = None
    """For mnist: new-labels (all ten digits, labels shuffled in each task; the default) or new-digits (meta-train on
    0-4, meta-test on 5-9)."""
    data_root: Path | None = None
    """The data's folder: MNIST/raw/*-ubyte, or Omniglot's archives; by default torchvision's download, or MNIST-5k
    without a network."""
    split: str | None = None
    """For omniglot: maml (1100, 100 and 423 characters; the default), vinyals or background-evaluation."""
    resize: str | None = None
    """For omniglot: lanczos (the default), bilinear, box, or nearest, which is what the original MAML code got."""
    image_size: tuple[int, int] | None = None
    """For folder: height and width to resize to; by default as they are."""
    rgb: bool = False
    """For folder: three colours instead of grey."""
    ways: int | None = None
    """N, the classes of a task (5 by default)."""
    shots: int | None = None
    """K, the support examples per class (1 by default), or per sinusoid (10)."""
    query_shots: int | None = None
    """The query examples per class, or per sinusoid (10)."""
    train_ways: int | None = None
    """The classes of a training task, for a head made of classes (zero-head, proto-maml); by default N."""
    train_shots: int | None = None
    """The support examples per class of a training task; by default K."""
    test_query_shots: int | None = None
    """The query examples per class of a validation or test task; by default as in training."""
    augment: str | None = None
    """Further training classes made of the given ones: none, rotations (each class turned by 90, 180 and 270 degrees
    is a further one), turns (each class of a task is turned by a random one of these, anew in each task) or warps
    (600 pseudo-characters)."""
    jitter: float | None = None
    """Move each training image by a small random affine map of this strength: 0 for none (the default), 0.1 for up to
    6 degrees and 10 % of stretch."""
    test_augment: str | None = None
    """The same for validation and test tasks: none (the default) or turns."""
    test_copies: int | None = None
    """Take each image of a validation or test task so many times, as it is and moved by the test's jitter, and average
    a query image's outputs over them (1 by default)."""
    test_jitter: float | None = None
    """The jitter of these copies; by default as in training."""
    statistics: str | None = None
    """Whose examples batch norms normalise by in validation and test: own (as --norm-policy says; the default), support
    (the support set, so that query examples do not inform each other) or with-query (the support set and one query
    example at a time, as Reptile's published code tests)."""

    # --- the model and its inner loop
    algorithm: str | None = None
    """fomaml (the default), maml, reptile, anil, boil, meta-sgd, maml++, imaml, cavia, sign-maml, zero-head or
    proto-maml."""
    model: str | None = None
    """mlp (784-256-10 on images, 1-40-40-1 on sinusoids; the default), conv4, conv4-strided (mean over space) or
    conv4-strided-flat (Reptile's)."""
    channels: tuple[int, ...] | None = None
    """The channels of the convolutions: one number for all (64 by default), or one for each of the four."""
    norm_policy: str | None = None
    """What batch norm normalises by: batch (the default; transductive), support, running or per-step."""
    norm_parameters: str | None = None
    """What batch norm learns: scale-shift (gamma and beta; the default) or shift (beta alone, as the original MAML
    code)."""
    adapt: str | None = None
    """What the inner loop moves: all that the algorithm adapts (the default), or no-norm, all of it but batch norm's
    parameters, which are meta-learned only (as in the original MAML code)."""
    inner_lr: float | None = None
    """The step size alpha of the inner loop."""
    inner_steps: int | None = None
    """The number of inner steps in training."""
    inner_loss: str | None = None
    """mean (the default) over the support examples, or summed: divided by the shots only, as in the original MAML
    code, where the step size is in effect N times alpha."""
    inner_optimizer: str | None = None
    """sgd (the default), adam, or carried-adam, whose second moments outlive a task (as in Reptile's code)."""
    inner_momentum: float | None = None
    """The momentum of the inner sgd, or beta1 of the inner adam (0 by default)."""
    inner_batch_size: int | None = None
    """Take each inner step on a mini-batch of the support set; by default on all of it."""
    test_inner_batch_size: int | None = None
    """The same for validation and test tasks; by default as in training."""
    learn_rates: str | None = None
    """Learn the step sizes too, from alpha on: none (the default), per-step (one per tensor and inner step) or
    elementwise."""
    rates_lr: float | None = None
    """The meta_lr of learned step sizes; by default meta_lr times alpha."""
    multi_step_iterations: int | None = None
    """Weigh the query losses of all inner steps, annealed to the last one over so many outer steps."""

    # --- the outer loop
    meta_lr: float | None = None
    """The step size of Adam in the outer loop (of SGD for reptile)."""
    meta_batch_size: int | None = None
    """The tasks of one outer step."""
    iterations: int | None = None
    """The number of outer steps."""
    schedule: str | None = None
    """The meta_lr over the iterations: constant, cosine or linear (to zero)."""
    weight_decay: float | None = None
    """The weight decay of the outer optimiser, decoupled for Adam (0 by default)."""
    clip: float | None = None
    """The largest norm of the whole meta-gradient, which is scaled down to it; by default any."""
    validate_every: int | None = None
    """The outer steps between two validations, 0 for none; by default a tenth of the iterations where the source has
    validation classes. The run's weights are then the best ones, last.safetensors holds the last."""
    validation_tasks: int | None = None
    """The number of validation tasks, the same each time (200 by default)."""
    patience: int | None = None
    """Stop after so many validations without a better one; by default never."""
    checkpoint_every: int = 500
    """The outer steps between two checkpoints; a run that was killed goes on from the last one."""

    # --- the test
    test_tasks: int = 1000
    """The number of unseen tasks to evaluate on."""
    test_steps: tuple[int, ...] | None = None
    """The numbers of inner steps to evaluate after (0 1 5 10 20 by default); the last one is the headline figure, and
    what validation goes by."""
    baselines: bool = True
    """Evaluate baselines on the same tasks."""

    # --- the machine
    engine: str = "auto"
    """How a meta-batch is computed: auto, loop, batched or factored."""
    tasks_at_once: int | None = None
    """At most so many tasks in memory at a time; by default as many as suit the engine."""
    compile: bool = False
    """Compile the meta-gradient: a minute or so at the start, faster steps after it."""
    autocast: str | None = None
    """The precision of the forward passes in training: none (that of the weights; the default), bfloat16, or auto
    (bfloat16 where the device has instructions for it)."""
    seed: int = 0
    """The seed of weights and tasks."""
    device: str = "cpu"
    """cpu, cuda, cuda:N or mps."""
    image: Annotated[tuple[int, int, int] | None, tyro.conf.Suppress] = None
    """Channels, height and width of the images, as the data has them."""
    choices: Annotated[dict[str, float] | None, tyro.conf.Suppress] = None
    """Further arguments of the algorithm; by default its recipe's."""


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


def _earlier(values: dict) -> dict:
    """Settings of an earlier format under today's names."""
    for old, new in (("test_statistics", "statistics"), ("norm_statistics", "norm_policy")):
        if old in values:
            values[new] = values.pop(old)
    if values.get("statistics") == "inductive":
        values["statistics"] = "support"
    return values


def from_json(text: str, origin: str) -> TrainConfig:
    """Read `to_json` back.

    Raises:
        InputError: not the JSON of a run's config; `origin` says where it was read.
    """
    try:
        values = {**PLAIN, **_earlier(json.loads(text))}  # a run from before an option was there
        for name in ("out", "data_root", "resume"):
            values[name] = values.get(name) and Path(values[name])
        for name in ("test_steps", "image", "image_size", "channels"):
            values[name] = values[name] and tuple(values[name])
        for name, other in FOLLOWING:
            values.setdefault(name, values.get(other))
        return TrainConfig(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{origin} is not the config of a run ({error})") from None
