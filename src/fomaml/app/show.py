"""`fomaml data`: what a source holds, and which settings fit it, before anything is trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fomaml.app import pictures
from fomaml.app.commands import given
from fomaml.app.grouped import READ, Groups, separator_of
from fomaml.app.images import KEPT
from fomaml.app.report import align
from fomaml.app.search import words_of
from fomaml.app.settings import Settings
from fomaml.app.settle import settle
from fomaml.app.show_options import ShowOptions
from fomaml.app.sources import Classes, Functions, path_of, source_of, split_name
from fomaml.data.arrays import Arrays
from fomaml.data.folder import load_folder
from fomaml.data.groups import GroupSource
from fomaml.data.table import read_table
from fomaml.errors import InputError
from fomaml.files import write_text
from fomaml.group_episodes import FEWEST_CLASSES

JSON, TEXT = "data.json", "data.txt"
LISTED = 20  # tasks or classes that are listed one by one
FEW_CLASSES = 6  # of a task, whose examples are counted one by one
SHOWN = 3  # examples whose numbers are shown
FEW_SMALL = 0.1  # of the tasks may be too small for the settings that fit
FEW_NUMBERS = 12  # in an example, beyond which its shape is shown alone
PARTS = ("training", "validation", "test")


def show(options: ShowOptions) -> dict[str, Any]:
    """What a source holds, JSON-able; written to --out with its text and a picture, if that is asked for.

    Raises:
        InputError: as the source that is read; --out holds such files already.
    """
    asked = {name: value for name, value in given(options).items() if name not in ("out", "json")}
    if options.out is not None and (options.out / JSON).exists():
        raise InputError(f"{options.out} already holds {JSON}; give another --out")
    name, path = split_name(options.source)
    if name in READ and path and not (options.rows.task or options.rows.target):
        facts, drawn = _columns(name, path, options), None
    else:
        settings = settle(**asked)
        facts, drawn = _tasks(settings, asked)
    if options.out is not None:
        picture = None if drawn is None else pictures.draw(drawn, options.out)
        facts["picture"] = picture
        write_text(options.out / JSON, json.dumps(facts, indent=2) + "\n")
        write_text(options.out / TEXT, describe(facts))
    return facts


def _tasks(settings: Settings, asked: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The facts, and what a picture is drawn of."""
    found: Any
    if split_name(settings.source)[0] == "folder" and settings.kind is None:
        found = _folder(settings)
    else:
        found = source_of(settings).load(settings, True)
    if isinstance(found, Functions):
        settings_that_fit = {"shots": settings.shots, "query_shots": settings.query_shots}
        facts = {"name": found.name, "origin": found.origin, "parts": [], "units": [], "fits": []}
        return {"what": "functions", **facts, "command": _command(asked, settings_that_fit)}, found
    if isinstance(found, Groups):
        return _of_groups(settings, found, asked), found
    return _of_classes(settings, found, asked), found


def _folder(settings: Settings) -> Classes:
    """A folder of images, whether or not it suffices for the settings."""
    path = path_of(settings)
    colour, few = "rgb" if settings.rgb else "grey", settings.skip_small_classes or 1
    folder = load_folder(
        path,
        size=settings.image_size,
        colour=colour,
        shares=settings.shares,
        min_images=few,
        in_memory=KEPT[settings.decode],
    )
    return Classes(folder.train, folder.validation, folder.test, Path(path).resolve().name, folder.origin)


# --- classes, and groups of rows ------------------------------------------------------------------


def _of_classes(settings: Settings, found: Classes, asked: Mapping[str, Any]) -> dict[str, Any]:
    sources = dict(zip(PARTS, (found.train, found.validation, found.test)))
    parts = [
        _part(part, list(zip(own.names, own.counts.tolist())))
        for part, own in sources.items()
        if own is not None
    ]
    units = [
        {"part": part, "name": name, "examples": count}
        for part, own in sources.items()
        if own is not None
        for name, count in zip(own.names, own.counts.tolist())
    ]
    room = min(row["smallest"][1] for row in parts)
    ways = min(len(found.train), len(found.test))
    fitting = _fitting(settings, room)
    if settings.ways > ways:
        fitting["ways"] = ways
    fits = [f"--ways of at most {ways}", f"--shots and --query-shots of at most {room} together"]
    if not fitting.get("shots", 1):
        fits = [f"a class has {room} example{'s' * (room != 1)}, and a task takes two or more of each"]
    return {
        "what": "classes",
        "name": found.name,
        "origin": found.origin,
        "inputs": {"shape": list(found.train.inputs.shape[1:])},
        "parts": parts,
        "units": units,
        "fits": fits,
        "command": _command(asked, fitting),
    }


def _of_groups(settings: Settings, found: Groups, asked: Mapping[str, Any]) -> dict[str, Any]:
    sources = dict(zip(PARTS, (found.train, found.validation, found.test)))
    there = {part: own for part, own in sources.items() if own is not None}
    units = [
        {"part": part, "name": name, "examples": int(count), **classes}
        for part, own in there.items()
        for name, count, classes in zip(own.names, own.counts, _by_class(own))
    ]
    gap = found.test.gap if settings.gap is None and settings.draw != "random" else settings.gap or 0
    needed = settings.shots + settings.test_query_shots
    rooms = np.concatenate(_rooms(there, settings, gap))
    small = [f"{unit['name']} ({unit['examples']})" for unit, room in zip(units, rooms) if room < needed]
    fitting, instead = _of_rooms(settings, _rooms(there, settings, gap)), {}
    for other in _others(settings, found):
        if not fitting.get("shots", 1):
            fitting, instead = _of_rooms(settings, _rooms(there, replace(settings, **other), gap)), other
    fitting |= instead
    per = " per class" if settings.kind == "classification" else ""
    between = f", with a gap of {gap} between them" if gap else ""
    sizes = {int(size) for size in np.quantile(rooms, (0, 0.1, 0.25, 0.5), method="lower")} | {needed}
    fits = [
        f"--shots and --query-shots of {size} together{per}{between}: {(rooms >= size).sum()} of {len(rooms)} tasks"
        for size in sorted(sizes)
        if size >= 2
    ]
    if instead:
        then = np.concatenate(_rooms(there, replace(settings, **instead), gap))
        size = min(
            needed, fitting.get("shots", settings.shots) + fitting.get("query_shots", settings.query_shots)
        )
        if size >= 2:
            fits.append(
                f"the same of {size} with {' '.join(words_of(instead))}: {(then >= size).sum()} of {len(then)} tasks"
            )
    own = found.facts
    return {
        "what": "groups",
        "name": found.name,
        "origin": found.origin,
        "kind": settings.kind,
        "inputs": {"shape": own["shapes"], "names": own["inputs"], "categories": own["categories"]},
        "targets": own["targets"],
        "classes": own["classes"],
        "parts": [_part(part, list(zip(own.names, own.counts.tolist()))) for part, own in there.items()],
        "units": units,
        "left_out": {"needed": needed + gap, "of": per.strip() or "of a task", "tasks": small},
        "examples": list(_examples(found.train.scaled(None))),
        "fits": fits,
        "command": _command(asked, fitting),
    }


def _by_class(source: GroupSource) -> Iterator[dict[str, Any]]:
    if source.class_counts is None or source.classes is None:
        yield from ({} for _ in source.names)
        return
    for counts in source.class_counts.tolist():
        yield {"classes": dict(zip(source.classes, counts))}


def _rooms(sources: Mapping[str, GroupSource], settings: Settings, gap: int) -> list[np.ndarray]:
    """By part (groups,) the rows that a group has for its two sets, of classification for each class of a task."""
    found = []
    ways = FEWEST_CLASSES if settings.fewer_classes else settings.ways
    for source in sources.values():
        rooms = source.counts
        if source.class_counts is not None:
            counts = -np.sort(-source.class_counts, axis=1)
            rooms = counts[:, ways - 1] if ways <= counts.shape[1] else np.zeros(len(counts), dtype=int)
        found.append(rooms - gap)
    return found


def _of_rooms(settings: Settings, parts: list[np.ndarray]) -> dict[str, Any]:
    """What fits tasks with room for so many rows. A few small ones are left out, rather than that all have few rows;
    half of them, where else nothing fits.
    """
    rooms, needed = np.concatenate(parts), settings.shots + settings.test_query_shots
    least, most = int(rooms.min()), int(np.quantile(rooms, FEW_SMALL, method="lower"))
    half = int(min(np.median(rooms), *(part.max() for part in parts)))  # and some are left of each part
    if most < 2 <= half:
        return _fitting(settings, half) | {"skip_small_groups": True}
    if least < needed and most > least and not settings.skip_small_groups:
        return _fitting(settings, most) | {"skip_small_groups": True}
    return _fitting(settings, most if settings.skip_small_groups else least)


def _others(settings: Settings, found: Groups) -> Iterator[dict[str, Any]]:
    """What else may fit where nothing does as asked: fewer classes in a task."""
    if settings.fixed_classes:
        yield {"fewer_classes": True}
    elif settings.kind == "classification":
        yield from (
            {"ways": ways} for ways in range(min(settings.ways - 1, len(found.test.classes or ())), 1, -1)
        )


def _part(part: str, sizes: list[tuple[str, int]]) -> dict[str, Any]:
    """How many tasks or classes a part has, and their sizes."""
    ordered = sorted(sizes, key=lambda size: size[1])
    return {
        "part": part,
        "number": len(sizes),
        "examples": sum(size for _, size in sizes),
        "smallest": list(ordered[0]),
        "largest": list(ordered[-1]),
    }


def _fitting(settings: Settings, room: int) -> dict[str, Any]:
    """The numbers of shots and query shots that so many examples have room for; none where those asked for fit."""
    shots, queries = settings.shots, settings.query_shots
    if shots + queries <= room:
        return {}
    shots = min(shots, room // 2)
    return {"shots": shots, "query_shots": max(0, min(queries, room - shots))}


def _command(asked: Mapping[str, Any], fitting: Mapping[str, Any]) -> str | None:
    """The line that trains on the source with settings that fit; None where none do."""
    if not fitting.get("shots", 1) or fitting.get("ways", 2) < 2:
        return None
    return f"fomaml train {shlex.join(words_of({**asked, **fitting}))}"


def _examples(source: GroupSource) -> Iterator[dict[str, Any]]:
    """The first rows as they are, where they are few numbers."""
    positions = np.arange(min(SHOWN, len(source.rows)))
    try:
        inputs, targets = source.take(positions)
    except (RuntimeError, TypeError):  # of a decoder that takes other things
        return
    if isinstance(inputs, dict) and set(inputs) == {"numbers", "categories"}:
        codes = [
            [source.categories[name][code] for name, code in zip(source.categories, row)]
            for row in inputs["categories"].tolist()
        ]
        rows = [[*numbers, *texts] for numbers, texts in zip(inputs["numbers"].tolist(), codes)]
    elif hasattr(inputs, "dim") and inputs.dim() == 2 and inputs.shape[1] <= FEW_NUMBERS:
        rows = inputs.tolist()
    else:
        return
    names = source.input_names or [f"input {number}" for number in range(len(rows[0]))]
    for row, target in zip(rows, targets.tolist()):
        said = source.classes[target] if source.classes is not None else target
        yield {"task": source.names[0], "inputs": dict(zip(names, row)), "target": said}


# --- columns, where it is not said which is what ---------------------------------------------------


def _columns(name: str, path: str, options: ShowOptions) -> dict[str, Any]:
    """What a file holds of which nothing has been said."""
    facts: dict[str, Any] = {"what": "columns", "name": Path(path).name, "origin": path}
    if name == "table":
        frame, _ = read_table(path, separator_of(options.rows.separator), options.rows.decimal or ".")
        facts["rows"] = len(frame)
        facts["columns"] = [
            {
                "name": column,
                "kind": str(frame[column].dtype),
                "different": int(frame[column].nunique()),
                "missing": int(frame[column].isna().sum()),
                "examples": [str(value) for value in frame[column].dropna().unique()[:SHOWN]],
            }
            for column in frame.columns
        ]
    else:
        arrays = Arrays(path)
        facts["columns"] = []
        for key in arrays:
            try:
                array = arrays[key]
            except InputError as error:
                facts["columns"].append({"name": key, "kind": str(error), "shape": None, "examples": []})
                continue
            first = [str(value) for value in np.unique(array.reshape(-1)[:1000])[:SHOWN]]
            facts["columns"].append(
                {"name": key, "kind": str(array.dtype), "shape": list(array.shape), "examples": first}
            )
    read = {key: getattr(options.rows, key) for key in ("separator", "decimal") if getattr(options.rows, key)}
    source = shlex.join(words_of({"source": f"{name}:{path}", **read}))
    needed = " ".join(f"--{option.replace('_', '-')} {option.upper()}" for option in READ[name][0])
    return facts | {"command": f"fomaml data {source} {needed}"}


# --- in words -------------------------------------------------------------------------------------


def describe(facts: Mapping[str, Any]) -> str:
    """The facts as text."""
    lines = [f"{facts['name']}: {facts['origin']}", ""]
    if facts["what"] == "columns":
        lines += [align([*_of_columns(facts)], left=True), "", "which is what?"]
        return "\n".join([*lines, facts["command"]]) + "\n"
    if facts["what"] != "functions":
        unit = "classes" if facts["what"] == "classes" else "tasks"
        table = [["part", unit, "examples", "smallest", "largest"]]
        for row in facts["parts"]:
            ends = [f"{size} ({name})" for name, size in (row["smallest"], row["largest"])]
            table.append([row["part"], str(row["number"]), str(row["examples"]), *ends])
        lines += [align(table, left=True), "", *_listed(facts, unit), f"inputs: {_shape(facts['inputs'])}"]
    for row in facts.get("examples", ()):
        own = ", ".join(f"{name} {_number(value)}" for name, value in row["inputs"].items())
        said = row["target"] if isinstance(row["target"], list) else [row["target"]]
        names = facts["targets"] or ["target"]
        lines.append(f"task {row['task']}: {own} -> {', '.join(names)} {' '.join(map(_number, said))}")
    small = facts.get("left_out", {}).get("tasks", [])
    if small:
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        lines += [
            "",
            f"{len(small)} tasks are too small for these settings, which take {facts['left_out']['needed']} rows "
            f"{facts['left_out']['of']}, and are refused, or left out with --skip-small-groups: "
            f"{', '.join(small[:5])}{more}",
        ]
    if facts["fits"]:
        lines += ["", "what fits:", *(f"  {line}" for line in facts["fits"])]
    if facts.get("picture"):
        lines += ["", facts["picture"]]
    return "\n".join([*lines, "", facts["command"] or "no settings fit: more examples are needed"]) + "\n"


def _of_columns(facts: Mapping[str, Any]) -> Iterator[list[str]]:
    if "rows" in facts:
        yield ["column", "kind", "different values", "missing", "such as"]
        for own in facts["columns"]:
            counts = [str(own["different"]), str(own["missing"])]
            yield [own["name"], own["kind"], *counts, ", ".join(own["examples"])]
        return
    yield ["key", "kind", "shape", "such as"]
    for own in facts["columns"]:
        yield [own["name"], own["kind"], str(tuple(own["shape"] or ())), ", ".join(own["examples"])]


def _listed(facts: Mapping[str, Any], unit: str) -> Iterator[str]:
    """The first tasks or classes one by one."""
    for own in facts["units"][:LISTED]:
        yield f"{own['part']} {own['name']}: {own['examples']}{_of_classes_told(own.get('classes'))}"
    if len(facts["units"]) > LISTED:
        yield f"and {len(facts['units']) - LISTED} more {unit}"
    yield ""


def _of_classes_told(counts: Mapping[str, int] | None) -> str:
    """How many examples each class has; of many classes how many there are, and of how many examples."""
    if not counts:
        return ""
    if len(counts) <= FEW_CLASSES:
        return f" ({', '.join(f'{name} {count}' for name, count in counts.items())})"
    there = [count for count in counts.values() if count]
    return f" ({len(there)} of {len(counts)} classes, of {min(there)} to {max(there)})"


def _shape(inputs: Mapping[str, Any]) -> str:
    names = inputs.get("names")
    if names:
        return ", ".join(names)
    shape = inputs["shape"]
    if isinstance(shape, dict):
        return ", ".join(f"{key} {tuple(own)}" for key, own in shape.items())
    return f"{tuple(shape)} each"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
