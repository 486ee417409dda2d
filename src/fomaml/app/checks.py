"""What the settings of a run may be, one by one and together: the options' and those that config.json holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F

from fomaml.app.algorithms import ALGORITHMS, ANY_WAYS
from fomaml.app.defaults import DEFAULTS
from fomaml.app.grouped import READ
from fomaml.app.named import LIBRARIES, OWN, foreign_model, is_foreign, is_own_metric
from fomaml.app.networks import NETWORKS
from fomaml.app.settings import Settings
from fomaml.app.sources import SOURCES, names, source_of, split_name
from fomaml.app.wording import option as typed
from fomaml.choices import check_choice
from fomaml.engines import ENGINES
from fomaml.errors import InputError, positive, shown, whole
from fomaml.metrics import metric_for

HINTS = get_type_hints(Settings)
# Whole numbers of 1 or more; the other two may be 0.
COUNTS = [
    name
    for name, hint in HINTS.items()
    if hint in (int, int | None) and name not in ("seed", "validate_every", "gap", "split_seed", "format")
]
SEEDS = 2**60
MOST = 10**15  # of anything that is counted: float64 and int64 hold it, and its products with other counts
MOST_STEPS = 10**6  # of one task
LARGEST = float(torch.finfo(torch.float32).max)  # what a weight can be moved by
SIZES = ("inner_lr", "meta_lr", "rates_lr", "clip", "seconds", "checkpoint_seconds")
BELOW = {"inner_momentum": 1, "weight_decay": math.inf, "jitter": 1, "test_jitter": 1}
# The options that only some sources take, with their values for all others.
OF_SOURCES: dict[str, Any] = {
    option: False if value is False else None
    for source in SOURCES.values()
    for option, value in source.options.items()
}
DECIDED = ("kind", "draw", "train_draw", "fixed_classes")  # by the data, where tasks are groups
# What makes no sense where there are no classes of images.
OF_CLASSES = ("augment", "jitter", "test_augment", "test_copies", "inner_loss")
CHOICES = {
    name: get_args(hint)
    for name, hint in HINTS.items()
    for hint in (next((each for each in (hint, *get_args(hint)) if get_origin(each) is Literal), None),)
    if hint is not None
}


def check(settings: Settings, given: Mapping[str, Any] = {}) -> None:
    """Raise `InputError` where a value is none of those there are, or options do not go together.

    given: the options that were asked for, where that makes a difference.
    """
    if not foreign_model(settings):
        check_choice("model", settings.model, [*NETWORKS, *OWN])
    check_choice("engine", settings.engine, ("auto", *ENGINES))
    for name, choices in CHOICES.items():
        if getattr(settings, name) is not None:
            check_choice(name.replace("_", " "), getattr(settings, name), choices)
    for name in COUNTS:
        if getattr(settings, name) is not None:
            within(typed(name), getattr(settings, name), MOST_STEPS if name == "inner_steps" else MOST)
    for name in SIZES:
        if getattr(settings, name) is not None:
            check_size(typed(name), getattr(settings, name))
    for name, most in BELOW.items():
        check_below(typed(name), getattr(settings, name), most)
    if len(settings.channels) not in (1, 4):
        raise InputError(
            f"--channels takes one number or four, one for each convolution, got {list(settings.channels)}"
        )
    for channels in settings.channels:
        within("each number of --channels", channels)
    for side in settings.image_size or ():
        within("each number of --image-size", side)
    for length in settings.image or ():
        within("each number of image", length)
    if settings.validate_every:
        within("--validate-every", settings.validate_every)
    for name in ("gap", "split_seed", "format"):
        if getattr(settings, name) is not None:
            whole(typed(name), getattr(settings, name), 0, SEEDS, f" from 0 to {SEEDS - 1}")
    if "test_jitter" in given and settings.test_copies == 1:
        raise InputError("--test-jitter moves the copies of each image: give --test-copies, 2 or more")
    if settings.seconds is not None and "iterations" in given:
        raise InputError(
            f"the budget is --iterations {settings.iterations} or --seconds {settings.seconds:g}, not both"
        )
    if settings.threads is not None and not settings.same_bits:
        raise InputError(
            "--threads is of --same-bits, whose bits depend on it: give both, or OMP_NUM_THREADS"
        )
    check_steps("--test-steps", settings.test_steps)
    check_seed(settings.seed)
    if settings.metric_direction is not None and not any(map(is_own_metric, settings.metric or ())):
        raise InputError("--metric-direction is of a function of your own: give --metric FILE.py:NAME")
    for name in settings.metric or ():
        if not is_own_metric(name):
            metric_for(F.cross_entropy, name)
    _check_source_options(settings)
    _check_features(settings)
    check_classless(settings)
    _check_algorithm(settings)
    _check_network(settings)


def check_source(source: str) -> None:
    """Raise `InputError` unless this names an entry of `SOURCES`, with what has to stand after its colon."""
    name, path = split_name(source)
    if name not in SOURCES or bool(path) != bool(SOURCES[name].path) or (":" in source and not path):
        check_choice("source", source, [each for each in names() if each != source])


def within(name: str, value: int, most: int = MOST) -> None:
    """Raise `InputError` unless this is a whole number from 1 to `most`."""
    positive(name, value, integer=True)
    if value > most:
        raise InputError(f"{name} must be a whole number from 1 to {most}, got {shown(value)}")


def check_size(name: str, value: float) -> None:
    """Raise `InputError` unless this is a positive number that float32 has."""
    positive(name, value)
    if value > LARGEST:
        raise InputError(f"{name} must be a positive number of at most {LARGEST:.2g}, got {shown(value)}")


def check_below(name: str, value: float, most: float) -> None:
    """Raise `InputError` unless 0 ≤ value < most."""
    if not 0 <= value < most:
        raise InputError(f"{name} must be 0 or more and below {most}, got {value}")


def check_seed(seed: int) -> None:
    """Raise `InputError` unless this is a seed that numpy and torch take, and three times it too."""
    if not 0 <= seed < SEEDS:
        raise InputError(f"--seed must be a whole number from 0 to {SEEDS - 1}, got {seed}")


def check_steps(name: str, steps: tuple[int, ...]) -> None:
    """Raise `InputError` unless these are ascending whole numbers of 0 or more."""
    if not steps or min(steps) < 0 or list(steps) != sorted(set(steps)):
        raise InputError(f"{name} must be ascending whole numbers of 0 or more, got {shown(list(steps))}")
    if steps[-1] > MOST_STEPS:
        raise InputError(f"{name} must be at most {MOST_STEPS}, got {shown(steps[-1])}")


def _check_source_options(settings: Settings) -> None:
    """The options that only some sources take, and those that its source cannot do without."""
    name, source = split_name(settings.source)[0], source_of(settings)
    for option, plain in OF_SOURCES.items():
        value = getattr(settings, option)
        if option not in (*source.options, *DECIDED) and value != plain:
            raise InputError(f"the source {name} takes no {typed(option)}, got {shown(value)}")
        if value is None and source.options.get(option) is not None:
            raise InputError(f"the source {name} needs {typed(option)}, got none")
    needed = READ[name][0] if name in READ else ()
    kinds = ("kind", "draw", "train_draw") if needed or settings.kind is not None else ()
    for option in (*needed, *kinds):
        if getattr(settings, option) is None:
            raise InputError(f"the source {name} needs {typed(option)}, got none")
    if not source.decide or (name == "folder" and settings.kind == "regression"):
        for option in (*DECIDED, "facts"):
            value = getattr(settings, option)
            if value is not None:
                raise InputError(f"the source {name} takes no {typed(option)}, got {shown(value)}")


def check_classless(settings: Settings) -> None:
    """Raise `InputError` where a source of functions, or of groups, is given an option of classes or images."""
    source, name, groups = source_of(settings), split_name(settings.source)[0], settings.kind is not None
    if source.kind == "regression":
        if not groups and settings.model != "mlp" and not foreign_model(settings):
            raise InputError(
                f"the source {name} goes with the model mlp or one of your own, got {settings.model!r}"
            )
        if ALGORITHMS[settings.algorithm].any_ways:
            raise InputError(f"the algorithm {settings.algorithm} needs classes: the source {name} has none")
    elif not groups:
        return
    if settings.fixed_classes and settings.train_ways != settings.ways:
        raise InputError(
            f"a task has the {settings.ways} classes of the data: give --ways to draw some, or no --train-ways"
        )
    lacks = "is of groups" if groups else "has no classes"
    for option in OF_CLASSES:
        value, plain = getattr(settings, option), DEFAULTS[option]
        if value != plain and not (option == "inner_loss" and source.kind == "classification"):
            plain = 0 if plain == 0 else plain
            raise InputError(f"the source {name} {lacks}: {typed(option)} must be {plain}, got {value!r}")


def _check_features(settings: Settings) -> None:
    """Options of a network that is run over the inputs once."""
    if settings.features_of is None:
        for name in ("features_weights", "features_layer", "features_in"):
            if getattr(settings, name) is not None:
                raise InputError(f"{typed(name)} goes with --features-of, the network that it is of")
        return
    if not is_foreign(settings.features_of):
        raise InputError(
            f"--features-of takes timm:NAME, torchvision:NAME, {' or '.join(OWN)}, got {settings.features_of!r}"
        )
    if source_of(settings).decide is None and source_of(settings).kind == "regression":
        raise InputError(
            f"the source {settings.source} draws new inputs for each task: give no --features-of"
        )
    for name in ("augment", "jitter", "test_augment", "test_copies"):
        if getattr(settings, name) != DEFAULTS[name]:
            raise InputError(
                f"--features-of gives one vector for each image, and {typed(name)} {getattr(settings, name)} changes "
                f"images: give {typed(name)} {DEFAULTS[name]}"
            )
    if settings.features_in is not None and settings.features_in.suffix == ".safetensors":
        raise InputError(
            f"--features-in takes a folder, which has a file for each part of the data, got {settings.features_in}"
        )


def _check_algorithm(settings: Settings) -> None:
    """Options that go with some algorithms only."""
    name = settings.algorithm
    algorithm = ALGORITHMS[name]
    if algorithm.models is not None and settings.model not in algorithm.models:
        raise InputError(
            f"the algorithm {name} goes with the model {' or '.join(algorithm.models)}, got {settings.model!r}"
        )
    if settings.train_ways != settings.ways and not algorithm.any_ways:
        raise InputError(
            f"{settings.train_ways} ways in training and {settings.ways} at test need a head made of classes: "
            f"--algorithm {' or '.join(ANY_WAYS)}, got {name}"
        )
    for refused, why in algorithm.refuses.items():
        option, _, value = refused.partition("=")
        found = getattr(settings, option)
        if str(found) == value if value else found != DEFAULTS[option]:
            text = f"{typed(option)} {found}"
            raise InputError(f"the option {text} does not go with the algorithm {name}: {why}")
    if settings.inner_loss == "summed" and settings.train_ways != settings.ways:
        raise InputError("--inner-loss summed is N times the mean: give no --train-ways beside it")
    if settings.learn_rates == "elementwise" and settings.train_ways != settings.ways:
        raise InputError(
            f"--learn-rates elementwise learns a head of {settings.train_ways} classes, of which {settings.ways} "
            "at test have no use: take per-step, or no --train-ways"
        )
    if settings.learn_rates != "none" and settings.inner_optimizer != "sgd":
        raise InputError(f"--learn-rates goes with --inner-optimizer sgd, got {settings.inner_optimizer}")
    if settings.multi_step_iterations is not None and settings.compile == "yes":
        raise InputError(
            "--compile yes does not take the multi-step loss, whose weights change at every iteration"
        )
    if settings.patience is not None and settings.validate_every == 0:
        raise InputError("--patience counts validations: give --validate-every 1 or more, got 0")


def _check_network(settings: Settings) -> None:
    """Options of convolutions of images, where there are none."""
    weights = settings.model_weights
    of_library = (
        settings.model.partition(":")[0] in LIBRARIES and weights is None
    )  # which has its own message
    if settings.norm_policy == "frozen" and weights in (None, "random") and not of_library:
        raise InputError("--norm-policy frozen takes statistics that were learned: give --model-weights FILE")
    if foreign_model(settings):
        for name in ("channels", "norm_parameters"):
            if getattr(settings, name) != DEFAULTS[name]:
                raise InputError(f"{typed(name)} is of the models by name, not of {settings.model}")
        return
    if weights is not None:
        raise InputError(
            f"--model-weights are of a model of your own, timm or torchvision, got {settings.model}"
        )
    if settings.model_options:
        raise InputError(
            f"--model-options go to a model of your own, {' or '.join(OWN)}, got {settings.model}"
        )
    if settings.model.startswith("conv4"):
        return
    for name in ("channels", "norm_policy", "norm_parameters", "adapt"):
        value = getattr(settings, name)
        if value != DEFAULTS[name]:
            value = " ".join(map(str, value)) if isinstance(value, tuple) else value
            has = (
                "has no convolutions and no batch norm" if settings.model == "mlp" else "is not one of images"
            )
            raise InputError(f"the model {settings.model} {has}: no {typed(name)} {value}")
