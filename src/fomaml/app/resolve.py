"""From the options that were given to all the settings of a run, checked."""

from __future__ import annotations

import math

from fomaml.app import settings as names
from fomaml.app.defaults import ALGORITHM_RECIPES, COMMON, PLAIN, RECIPES
from fomaml.app.presets import PRESETS
from fomaml.app.settings import TrainConfig, check_steps, known
from fomaml.errors import InputError, positive

KNOWN = {
    "model": names.MODELS,
    "augment": names.AUGMENTATIONS,
    "test_augment": names.TEST_AUGMENTATIONS,
    "statistics": names.STATISTICS,
    "norm_policy": names.NORM_POLICIES,
    "norm_parameters": names.NORM_PARAMETERS,
    "adapt": names.ADAPTED,
    "inner_loss": names.INNER_LOSSES,
    "inner_optimizer": names.INNER_OPTIMIZERS,
    "learn_rates": names.LEARNED_RATES,
    "schedule": names.SCHEDULES,
    "engine": names.ENGINES,
    "autocast": names.PRECISIONS,
}
COUNTS = (
    *("ways", "query_shots", "train_ways", "train_shots", "test_query_shots", "test_copies", "inner_steps"),
    *("meta_batch_size", "iterations", "validation_tasks", "test_tasks", "checkpoint_every"),
)
OPTIONAL_COUNTS = (
    *("inner_batch_size", "test_inner_batch_size", "multi_step_iterations", "patience", "tasks_at_once"),
)


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what was left out, and check every value that can be checked without data.

    What was given comes first, then the preset's, then the algorithm's and the source's recipe.

    Raises:
        InputError: an unknown name (the message lists the known ones), a number that is not positive, or
            options that do not go together.
    """
    given = {k: v for k, v in vars(config).items() if v not in (None, "")}
    if config.preset is not None:
        known("preset", config.preset, tuple(PRESETS))
        given = {**PRESETS[config.preset].settings, **given}
    source = given.get("source", "")
    kind, _, path = source.partition(":")
    if (kind == "folder") != bool(path) or kind not in ("mnist", "omniglot", "folder", "sinusoid"):
        known("source", source, names.SOURCES)
    algorithm = given.get("algorithm", PLAIN["algorithm"])
    known("algorithm", algorithm, names.ALGORITHMS)
    sinusoid = kind == "sinusoid"
    question = given.get("question", "")
    if kind == "mnist":
        question = question or "new-labels"
        known("question", question, names.QUESTIONS)
    elif question:
        raise InputError(f"the source {kind} has no question, got {question!r}")
    shots = positive("shots", given.get("shots", 10 if sinusoid else 1), integer=True)
    recipes = RECIPES[kind, question]
    recipe = recipes[max(k for k in recipes if k <= shots)]
    defaults = {**PLAIN, **COMMON, "model": "mlp", "query_shots": 10, **recipe}
    defaults |= ALGORITHM_RECIPES.get(("regression" if sinusoid else "classification", algorithm), {})
    if kind != "omniglot":
        defaults["resize"] = None
    values = {**defaults, **given, "question": question, "shots": shots}
    for name, other in names.FOLLOWING:
        values.setdefault(name, values.get(other))
    if algorithm == "maml++":
        values.setdefault("multi_step_iterations", max(1, values["iterations"] // 10))
    config = TrainConfig(**values)
    for name, allowed in KNOWN.items():
        known(name.replace("_", " "), getattr(config, name), allowed)
    for name in COUNTS:
        positive(name, getattr(config, name), integer=True)
    if len(config.channels) not in (1, 4):
        raise InputError(
            f"--channels takes one number or four, one for each convolution, got {list(config.channels)}"
        )
    for channels in config.channels:
        positive("channels", channels, integer=True)
    for name in OPTIONAL_COUNTS:
        if getattr(config, name) is not None:
            positive(name, getattr(config, name), integer=True)
    for name in ("inner_lr", "meta_lr", "rates_lr", "clip"):
        if getattr(config, name) is not None:
            positive(name, getattr(config, name))
    if config.validate_every:
        positive("validate_every", config.validate_every, integer=True)
    for name, most in (("inner_momentum", 1), ("weight_decay", math.inf), ("jitter", 1), ("test_jitter", 1)):
        check_below(name, getattr(config, name), most)
    if "test_jitter" in given and config.test_copies == 1:
        raise InputError("--test-jitter moves the copies of each image: give --test-copies, 2 or more")
    check_steps(config.test_steps)
    _check_source(config, kind)
    _check_algorithm(config)
    return config


def check_below(name: str, value: float, most: float) -> None:
    """Raise `InputError` unless 0 ≤ value < most."""
    if not 0 <= value < most:
        raise InputError(f"{name} must be 0 or more and below {most}, got {value}")


def check_classless(config: TrainConfig) -> None:
    """Raise `InputError` where sinusoids are given an option of classes or images."""
    if config.source != "sinusoid":
        return
    refused = {"augment": "none", "jitter": 0, "test_augment": "none", "test_copies": 1, "inner_loss": "mean"}
    for name, plain in refused.items():
        if getattr(config, name) != plain:
            raise InputError(
                f"the source sinusoid has no classes: {name} must be {plain}, got {getattr(config, name)!r}"
            )


def _check_source(config: TrainConfig, kind: str) -> None:
    """Options that go with some sources only."""
    if kind == "omniglot":
        known("split", config.split, names.SPLITS)
        known("resize", config.resize, names.FILTERS)
    else:
        if config.split is not None:
            raise InputError(f"the source {kind} has no named splits, got {config.split!r}")
        if config.resize is not None:
            raise InputError(f"the source {kind} has no named resize filters, got {config.resize!r}")
    if kind != "sinusoid":
        return
    if config.model != "mlp":
        raise InputError(f"the source sinusoid goes with the model mlp, got {config.model!r}")
    if config.algorithm in names.CLASSIFIERS:
        raise InputError(f"the algorithm {config.algorithm} needs classes: the source sinusoid has none")
    check_classless(config)


def _check_algorithm(config: TrainConfig) -> None:
    """Options that go with some algorithms and models only."""
    algorithm = config.algorithm

    def refuse(option: str, algorithms: tuple[str, ...], why: str) -> None:
        if algorithm in algorithms:
            raise InputError(f"the option {option} does not go with the algorithm {algorithm}: {why}")

    if algorithm == "cavia" and config.model != "mlp":
        raise InputError(f"the algorithm cavia goes with the model mlp, got {config.model!r}")
    if config.train_ways != config.ways and algorithm not in names.CLASSIFIERS:
        raise InputError(
            f"{config.train_ways} ways in training and {config.ways} at test need a head made of classes: "
            f"--algorithm {' or '.join(names.CLASSIFIERS)}, got {algorithm}"
        )
    if config.model == "mlp":
        for name in ("channels", "norm_policy", "norm_parameters", "adapt"):
            if getattr(config, name) != PLAIN[name]:
                value = getattr(config, name)
                value = " ".join(map(str, value)) if isinstance(value, tuple) else value
                option = f"--{name.replace('_', '-')} {value}"
                raise InputError(f"the model mlp has no convolutions and no batch norm: no {option}")
    if config.inner_loss == "summed" and config.train_ways != config.ways:
        raise InputError("--inner-loss summed is N times the mean: give no --train-ways beside it")
    if config.learn_rates != "none":
        refuse("--learn-rates", ("meta-sgd",), "it learns them anyway, elementwise")
        refuse("--learn-rates", ("reptile", "imaml"), "its meta-gradient does not reach the step sizes")
        if config.learn_rates == "elementwise" and config.train_ways != config.ways:
            raise InputError(
                f"--learn-rates elementwise learns a head of {config.train_ways} classes, of which {config.ways} "
                "at test have no use: take per-step, or no --train-ways"
            )
        if config.inner_optimizer != "sgd":
            raise InputError(f"--learn-rates goes with --inner-optimizer sgd, got {config.inner_optimizer}")
    if config.multi_step_iterations is not None:
        refuse("--multi-step-iterations", ("reptile", "imaml"), "it has no query loss at each step")
        if config.compile:
            raise InputError(
                "--compile does not take the multi-step loss, whose weights change at every iteration"
            )
    if config.inner_optimizer != "sgd" or config.inner_momentum:
        refuse("--inner-optimizer", ("sign-maml",), "its steps go along the sign of the gradient")
    if config.inner_optimizer != "sgd":
        why = "the derivative of Adam's step is of no use"
        refuse(f"--inner-optimizer {config.inner_optimizer}", ("maml", "meta-sgd", "maml++"), why)
    if config.inner_optimizer == "carried-adam":
        why = "each task starts elsewhere than at the meta-parameters"
        refuse("--inner-optimizer carried-adam", ("cavia", *names.CLASSIFIERS), why)
    if config.adapt == "no-norm":
        refuse("--adapt no-norm", ("anil", "boil", "cavia", "imaml"), "it says itself what adapts")
    if config.patience is not None and config.validate_every == 0:
        raise InputError("--patience counts validations: give --validate-every 1 or more, got 0")
