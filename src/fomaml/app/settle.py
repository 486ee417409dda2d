"""From what was asked for to the settings of a run, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.check_settings import check_settings
from fomaml.app.checks import CHOICES, OF_SOURCES, check_source, within
from fomaml.app.defaults import DEFAULTS, FOLLOWING
from fomaml.app.fits import check_image_fits, check_training_fits
from fomaml.app.images import images_needed
from fomaml.app.logs import with_logs
from fomaml.app.named import LIBRARIES, parsed, plain, with_own
from fomaml.app.presets import PRESETS
from fomaml.app.settings import Settings
from fomaml.app.sizing import sized
from fomaml.app.sources import SOURCES, names, split_name
from fomaml.app.wording import option as typed
from fomaml.choices import check_choice
from fomaml.errors import InputError

# What may be given; the others are found out.
ASKED = {field.name for field in dataclasses.fields(Settings)} - {"own", "code"}


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
    if "source" not in asked:
        raise InputError(f"name a source of tasks: {', '.join(names())}")
    check_source(asked["source"])
    name, path = split_name(asked["source"])
    source = SOURCES[name]
    if asked.get("image_size"):
        check_image_fits(asked["image_size"], bool(asked.get("rgb")))
    for option in OF_SOURCES:
        if option in asked and asked[option] != OF_SOURCES[option] and option not in source.options:
            raise InputError(f"the source {name} takes no {typed(option)}, got {asked[option]!r}")
    if path and asked.get("data_root") is not None:
        raise InputError(
            f"{asked['source']} says itself where its data are: no --data-root, which a run takes whose data have moved"
        )
    algorithm = asked.get("algorithm", DEFAULTS["algorithm"])
    check_choice("algorithm", algorithm, ALGORITHMS)
    question = asked.get("question", source.options.get("question"))
    if question is not None:
        check_choice("question", question, CHOICES["question"])
    decided = source.decide(name, path, asked) if source.decide else {}
    kind = decided.get("kind", source.kind)
    suited = source.defaults[question or ""]
    shots = asked.get("shots", suited[min(suited)].get("shots", DEFAULTS["shots"]))
    within("--shots", shots)
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
    check_settings(settings, given=given)
    check_training_fits(settings)
    settings = with_logs(with_own(settings))  # after all else, as it runs code
    if sized_to_it:
        settings = dataclasses.replace(settings, validation_tasks=sized(settings).validation_tasks)
        origins["validation_tasks"] = "the length of the run"
    return settings, origins


def as_kept(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the settings keep them, where Python's words for them are others."""
    kept: dict[str, Any] = {}
    if "model_options" in given:
        options = given["model_options"]
        pairs = options.items() if isinstance(options, Mapping) else parsed(options).items()
        kept["model_options"] = {name: plain(name, value) for name, value in pairs}
    if isinstance(given.get("compile"), bool):
        kept["compile"] = "yes" if given["compile"] else "no"
    if "metric" in given:
        asked = given["metric"]
        kept["metric"] = (asked,) if isinstance(asked, str) else tuple(asked)
    if "output" in given:
        kept["output"] = judged_output(given["output"])
    return kept


def judged_output(given: str | int | None) -> str | int | None:
    """What --output says: a name, or a number."""
    return int(given) if isinstance(given, str) and given.lstrip("-").isdigit() else given
