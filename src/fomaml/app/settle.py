"""From what was asked for to the settings of a run, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fomaml.app.algorithms import ALGORITHMS, ANY_WAYS
from fomaml.app.defaults import DEFAULTS, FOLLOWING
from fomaml.app.images import images_needed
from fomaml.app.logs import with_logs
from fomaml.app.named import LIBRARIES, OWN, foreign_model, is_foreign, is_own_metric, parsed, plain, with_own
from fomaml.app.networks import NETWORKS
from fomaml.app.presets import PRESETS
from fomaml.app.settings import Settings
from fomaml.app.sizing import sized
from fomaml.app.sources import SOURCES, names, source_of, split_name
from fomaml.app.wording import option as typed
from fomaml.choices import check_choice
from fomaml.engines import ENGINES
from fomaml.errors import InputError, positive

HINTS = get_type_hints(Settings)
# What may be given; the others are found out.
ASKED = {field.name for field in dataclasses.fields(Settings)} - {"own", "code"}
# Whole numbers of 1 or more; the other two may be 0.
COUNTS = [
    name
    for name, hint in HINTS.items()
    if hint in (int, int | None) and name not in ("seed", "validate_every", "gap", "split_seed")
]
SEEDS = 2**60
SIZES = ("inner_lr", "meta_lr", "rates_lr", "clip", "seconds", "checkpoint_seconds")
BELOW = {"inner_momentum": 1, "weight_decay": math.inf, "jitter": 1, "test_jitter": 1}
# The options that only some sources take, with their values for all others.
OF_SOURCES: dict[str, Any] = {
    option: False if value is False else None
    for source in SOURCES.values()
    for option, value in source.options.items()
}
# What makes no sense where there are no classes of images.
OF_CLASSES = ("augment", "jitter", "test_augment", "test_copies", "inner_loss")
CHOICES = {
    name: get_args(hint)
    for name, hint in HINTS.items()
    for hint in (next((each for each in (hint, *get_args(hint)) if get_origin(each) is Literal), None),)
    if hint is not None
}


def settle(**given: Any) -> Settings:
    """The settings of a run out of the options that were given, by name; see `settle_with_origins`."""
    return settle_with_origins(given)[0]


def settle_with_origins(given: Mapping[str, Any]) -> tuple[Settings, dict[str, str]]:
    """Fill in what was left out, and check every value that can be checked without data.

    What was given comes first, then the preset's, the algorithm's and the source's values, then the default.

    Returns the settings and, by name, where each came from.

    Raises:
        InputError: an unknown name (the message lists the known ones), a number that is not positive, or
            options that do not go together.
    """
    unknown = sorted(set(given) - ASKED)
    if unknown:
        raise InputError(f"there is no option {unknown[0]!r}")
    given = {name: value for name, value in given.items() if value is not None}
    given |= as_kept(given)
    preset: Mapping[str, Any] = {}
    if "preset" in given:
        check_choice("preset", given["preset"], PRESETS)
        preset = PRESETS[given["preset"]].settings
    asked = {**preset, **given}
    name, path = split_name(asked.get("source", ""))
    if name not in SOURCES or bool(path) != bool(SOURCES[name].path):
        if "source" not in asked:
            raise InputError(f"name a source of tasks: {', '.join(names())}")
        check_choice("source", asked["source"], names())
    source = SOURCES[name]
    for option in OF_SOURCES:
        if option in asked and asked[option] != OF_SOURCES[option] and option not in source.options:
            raise InputError(f"the source {name} takes no {typed(option)}, got {asked[option]!r}")
    algorithm = asked.get("algorithm", DEFAULTS["algorithm"])
    check_choice("algorithm", algorithm, ALGORITHMS)
    question = asked.get("question", source.options.get("question"))
    if question is not None:
        check_choice("question", question, CHOICES["question"])
    decided = source.decide(name, path, asked) if source.decide else {}
    kind = decided.get("kind", source.kind)
    suited = source.defaults[question or ""]
    shots = asked.get("shots", suited[min(suited)].get("shots", DEFAULTS["shots"]))
    positive("--shots", shots, integer=True)
    layers = [
        ("default", {**DEFAULTS, **OF_SOURCES}),
        (f"source {name}", {**source.options, **suited[max(few for few in suited if few <= shots)]}),
        (f"algorithm {algorithm}", ALGORITHMS[algorithm].defaults.get(kind, {})),
        ("the data", decided),
        (f"preset {given.get('preset')}", preset),
        ("given", given),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        values |= layer
        origins |= dict.fromkeys(layer, origin)
    for follower, leader in FOLLOWING.items():
        if follower not in values:
            values[follower], origins[follower] = values[leader], f"as {leader}"
    if "features_of" in asked and "model" not in asked:
        values["model"], origins["model"] = "linear", "a head for features_of"
    if values["model"].partition(":")[0] in LIBRARIES and "norm_policy" not in asked:
        random = values.get("model_weights") == "random"
        values["norm_policy"] = "batch" if random else "frozen"
        origins["norm_policy"] = "random weights" if random else "the statistics of model_weights"
    if values.get("loss") is not None and "statistics" not in asked:
        # a loss makes its own forward passes, which are told of no support set
        values["statistics"], origins["statistics"] = "own", "a loss of one's own"
    if algorithm == "maml++" and values["multi_step_iterations"] is None:
        values["multi_step_iterations"] = max(1, values["iterations"] // 10)
        origins["multi_step_iterations"] = "a tenth of iterations"
    if values["skip_small_classes"]:
        needed = (values[name] for name in ("train_shots", "query_shots", "shots", "test_query_shots"))
        values["skip_small_classes"] = max(images_needed(*needed))
    if values["same_bits"] and values["threads"] is None:
        values["threads"], origins["threads"] = 1, "same_bits"
    sized_to_it = values["validation_tasks"] is None
    settings = Settings(**{**values, "validation_tasks": 1} if sized_to_it else values)
    check(settings, given)
    settings = with_logs(with_own(settings))  # after all else, as it runs code
    if sized_to_it:
        settings = dataclasses.replace(settings, validation_tasks=sized(settings).validation_tasks)
        origins["validation_tasks"] = "the length of the run"
    return settings, origins


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
            positive(typed(name), getattr(settings, name), integer=True)
    for name in SIZES:
        if getattr(settings, name) is not None:
            positive(typed(name), getattr(settings, name))
    for name, most in BELOW.items():
        check_below(typed(name), getattr(settings, name), most)
    if len(settings.channels) not in (1, 4):
        raise InputError(
            f"--channels takes one number or four, one for each convolution, got {list(settings.channels)}"
        )
    for channels in settings.channels:
        positive("each number of --channels", channels, integer=True)
    if settings.validate_every:
        positive("--validate-every", settings.validate_every, integer=True)
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
    _check_features(settings)
    check_classless(settings)
    _check_algorithm(settings)
    _check_network(settings)


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
        raise InputError(f"{name} must be ascending whole numbers of 0 or more, got {list(steps)}")


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


def as_kept(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the user's own code as the settings keep them."""
    kept: dict[str, Any] = {}
    if "model_options" in given:
        options = given["model_options"]
        pairs = options.items() if isinstance(options, Mapping) else parsed(options).items()
        kept["model_options"] = {name: plain(name, value) for name, value in pairs}
    if "metric" in given:
        asked = given["metric"]
        kept["metric"] = (asked,) if isinstance(asked, str) else tuple(asked)
    if "output" in given:
        kept["output"] = judged_output(given["output"])
    return kept


def judged_output(given: str | int | None) -> str | int | None:
    """What --output says: a name, or a number."""
    return int(given) if isinstance(given, str) and given.lstrip("-").isdigit() else given


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
    if settings.multi_step_iterations is not None and settings.compile:
        raise InputError(
            "--compile does not take the multi-step loss, whose weights change at every iteration"
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
