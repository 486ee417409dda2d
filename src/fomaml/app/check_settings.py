"""Whole settings, checked: of the types that their fields have, then as `checks.check` does. Options and config.json
come through here alike.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.checks import HINTS, LARGEST, check, check_below, check_source, within
from fomaml.app.named import WEIGHTS
from fomaml.app.presets import PRESETS
from fomaml.app.settings import Settings, from_json
from fomaml.app.wording import option as typed
from fomaml.choices import check_choice, nearest_first
from fomaml.data.scaling import Scaling
from fomaml.errors import InputError, shown

Shapes = list[Any] | dict[str, Any]
# What the data of groups of rows have told, see `grouped.parts_of`.
FACTS: dict[str, Any] = {
    "classes": list[str] | None,
    "inputs": list[str] | None,
    "targets": list[str] | None,
    "categories": dict[str, list[str]] | None,
    "shapes": Shapes,
    "outputs": int | None,
    "split": dict[str, Any],
    "scaling": dict[str, Any],
}
PARTS = ("train", "validation", "test")
NAMES: dict[Any, tuple[str, str]] = {  # of one and of several
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
    Path: ("a path", "paths"),
    dict: ("an object", "objects"),
}


def read_settings(text: str, origin: str) -> Settings:
    """The settings of a run out of its config.json, checked as options are.

    Raises:
        InputError: no JSON, settings that are unknown or missing, or as `check_settings`. origin: where it was read.
    """
    settings = from_json(text, origin)
    check_settings(settings, origin)
    if settings.kind is not None and settings.facts is None:
        raise InputError(f"{origin}: it has no facts of its data, the columns, classes and split")
    return settings


def check_settings(settings: Settings, origin: str = "", given: Mapping[str, Any] = {}) -> None:
    """Raise `InputError` where a setting is not of its type or range, or settings do not go together.

    origin: the file that they come from, which the message then names. given: as of `check`.
    """
    try:
        for name, hint in HINTS.items():
            if name != "own":
                _check_type(typed(name), getattr(settings, name), hint)
        check_source(settings.source)
        check_choice("algorithm", settings.algorithm, ALGORITHMS)
        if settings.preset is not None:
            check_choice("preset", settings.preset, PRESETS)
        check(settings, given)
        _check_choices(settings)
        _check_code(settings)
        if settings.facts is not None:
            _check_facts(settings.facts)
        for change in settings.changed or ():
            if change.keys() != {"iteration", "setting", "from", "to"} or change["setting"] not in HINTS:
                raise InputError(f"changed must be what `changed_settings` records, got {shown(change)}")
    except InputError as error:
        if not origin:
            raise
        raise InputError(f"{origin}: {error}") from None


# --- types ----------------------------------------------------------------------------------------


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Raise `InputError` unless a value is of the type that a field declares; words of a Literal: see `check`."""
    if not _is(value, hint):
        given = list(value) if isinstance(value, tuple) else value  # as JSON has it
        raise InputError(f"{name} must be {_named(hint)}, got {shown(given)}")
    for text in _texts(value):
        if "\0" in text or any(
            "\ud800" <= letter < "\udc80" for letter in text
        ):  # those above are bytes of a path
            raise InputError(f"{name} has a character that no text has, got {shown(text)}")


def _is(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_is(value, each) for each in parts)
    if hint is Any or hint is None or hint is type(None):
        return hint is Any or value is None
    if kind is Literal:
        return value is not None or None in parts
    if kind is tuple:
        if not isinstance(value, tuple) or not value:
            return False
        if Ellipsis in parts:
            return all(_is(each, parts[0]) for each in value)
        return len(value) == len(parts) and all(map(_is, value, parts))
    if kind is list:
        return isinstance(value, list) and all(_is(each, parts[0]) for each in value)
    if kind is dict:
        return isinstance(value, dict) and all(
            _is(key, parts[0]) and _is(own, parts[1]) for key, own in value.items()
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _named(hint: Any, several: bool = False) -> str:
    """A type in words."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(_named(each, several) for each in parts if each is not type(None))
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind in (tuple, list):
        number = f"{len(parts)}" if kind is tuple and Ellipsis not in parts else "one or more"
        return f"a list of {number} {_named(parts[0], True)}"
    return NAMES.get(kind or hint, ("anything", "anything"))[several]


def _texts(value: Any) -> Iterator[str]:
    """All texts within nested lists and objects, paths and keys included."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, dict):
        for key, own in value.items():
            yield from (*_texts(key), *_texts(own))
    elif isinstance(value, list | tuple):
        for own in value:
            yield from _texts(own)


# --- what is nested -------------------------------------------------------------------------------


def _check_choices(settings: Settings) -> None:
    """The further arguments of an algorithm."""
    signature = inspect.signature(ALGORITHMS[settings.algorithm].make)
    known = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and isinstance(parameter.default, int | float)
    }
    for name, value in (settings.choices or {}).items():
        if name not in known:
            there = f"; there are: {nearest_first(name, list(known))}" if known else ""
            raise InputError(f"the algorithm {settings.algorithm} takes no choice {shown(name)}{there}")
        if isinstance(known[name], float):
            check_below(f"the choice {name}", value, LARGEST)
        else:
            within(f"the choice {name}", value)  # type: ignore[arg-type]


def _check_code(settings: Settings) -> None:
    """The digests of the user's own files."""
    for key, record in (settings.code or {}).items():
        fields: dict[str, Any] = {"name": str, "sha256": str}
        if key in WEIGHTS.values():
            if getattr(settings, key) is None:
                raise InputError(f"code has a digest of {typed(key)}, which must then be a file, got none")
        else:
            fields["beside"] = dict[str, str]
        for name, hint in fields.items():
            _check_type(f"the {name} of code {shown(key)}", record.get(name), hint)
        _check_type(f"before of code {shown(key)}", record.get("before", []), list[dict[str, str]])


def _check_facts(facts: Mapping[str, Any]) -> None:
    for name, hint in FACTS.items():
        if name not in facts:
            raise InputError(f"facts lacks {name}, {_named(hint)}")
        _check_type(f"{name} of facts", facts[name], hint)
    for name in ("shapes", "drawn"):
        if name in facts:
            _check_shapes(f"{name} of facts", facts[name])
    if facts["outputs"] is not None:
        within("outputs of facts", facts["outputs"])
    for part in PARTS:
        _check_type(f"{part} of the split of facts", facts["split"].get(part), list[str] | None)
    for part in ("train", "test"):
        if not facts["split"].get(part):
            raise InputError(f"{part} of the split of facts must be one or more keys, got none")
    scaling = Scaling.from_dict(facts["scaling"])
    for each in (*scaling.inputs.values(), *scaling.targets.values()):
        for name, numbers in each._asdict().items():
            _check_type(f"{name} of the scaling of facts", numbers, list[float])
            if not numbers or not all(map(math.isfinite, numbers)):
                raise InputError(
                    f"{name} of the scaling of facts must be finite numbers, got {shown(numbers)}"
                )


def _check_shapes(name: str, shapes: Any) -> None:
    if isinstance(shapes, dict | list) and not all(map(_is_length, shapes)):
        for each in shapes.values() if isinstance(shapes, dict) else shapes:
            _check_shapes(name, each)
    elif isinstance(shapes, list):
        for length in shapes:
            within(f"each number of {name}", length)
    else:
        raise InputError(f"{name} must be lists of whole numbers, got {shown(shapes)}")


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
