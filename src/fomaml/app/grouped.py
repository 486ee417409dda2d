"""Sources whose tasks are groups of rows: tables, arrays and recordings with a task key, folders TASK/CLASS/IMAGE."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fomaml.app.images import KEPT
from fomaml.app.settings import Decode, Settings
from fomaml.app.wording import option as typed
from fomaml.app.wording import with_shares
from fomaml.data.arrays import Arrays, together
from fomaml.data.folder import has_tasks, load_tasks
from fomaml.data.groups import GroupSource, GroupSplit
from fomaml.data.keys import few
from fomaml.data.scaling import Scaling
from fomaml.errors import InputError

# The options that say how a file is read, by source; the first ones must be given.
READ = {
    "table": (
        ("task", "target"),
        ("order", "features", "categorical", "kind", "drop_missing", "separator", "decimal"),
    ),
    "arrays": (("task", "inputs", "target"), ("order", "kind")),
    "windows": (("task", "inputs", "target", "lengths", "window", "hop"), ("kind", "skip_short")),
}

# what `GroupSource.split` says, and what stands for it here
SPOKEN = (
    ("need one for the test", "need one for the test: give --test-keys"),
    ("another split", "other --shares or --test-keys"),
)
OF_FOLDER_TASKS = (
    "test_keys",
    "validation_keys",
    "split_seed",
    "skip_small_groups",
    "fewer_classes",
    "query_all",
)


class Groups(NamedTuple):
    """The tasks to train, to validate and to test on, and the name and origin of the data.

    facts: JSON-able, what the data have told and a run must know again: columns, classes, split, scaling.
    unvalidated: why there are no validation tasks.
    """

    train: GroupSource
    validation: GroupSource | None
    test: GroupSource
    name: str
    origin: str
    facts: dict[str, Any]
    unvalidated: str = ""


def decide(name: str, path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the data decide of the settings: the kind, the number of classes, whether rows have an order.

    Raises:
        InputError: an option that is needed is not given, or as the source that is read.
    """
    for needed in READ[name][0]:
        if asked.get(needed) is None:
            others = " ".join(f"{typed(each)} {each.upper()}" for each in READ[name][0])
            raise InputError(f"the source {name} needs {typed(needed)}: fomaml train {name}:FILE {others}")
    inputs = asked.get("inputs") or ()
    for option, keys in (("--task", (asked["task"],)), ("--target", asked["target"])):
        if both := [key for key in keys if key in inputs]:
            raise InputError(f"{both[0]!r} is given both as {option} and as --inputs; it can be one of them")
    source = read(name, path, asked)
    ordered = name == "windows" or asked.get("order") is not None
    draw = asked.get("draw") or ("first" if ordered else "random")
    if draw != "random" and not ordered:
        raise InputError(
            f"--draw {draw} needs rows in an order: give --order, the column that they are sorted by"
        )
    found: dict[str, Any] = {"kind": source.kind, "draw": draw, "fixed_classes": None}
    found["train_draw"] = asked.get("train_draw") or ("anytime" if name == "windows" else draw)
    if source.classes is not None:
        found["fixed_classes"] = "ways" not in asked
        found["ways"] = asked.get("ways", len(source.classes))
    elif "ways" in asked:
        raise InputError(f"the tasks of {path} are regression, which has no classes: give no --ways")
    return found


def decide_folder(name: str, path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """As `decide`, of a folder TASK/CLASS/IMAGE; nothing of one without tasks.

    A task has all classes where every task has the same ones and no --ways are given, else so many of its own.
    """
    if not has_tasks(path):
        for option in OF_FOLDER_TASKS:
            if asked.get(option):
                raise InputError(f"{typed(option)} is for a folder TASK/CLASS/IMAGE, and {path} is none")
        return {}
    if asked.get("skip_small_classes"):
        raise InputError(
            "--skip-small-classes is for a folder CLASS/IMAGE: of tasks take --skip-small-groups"
        )
    source = read_folder(path, asked.get("image_size"), bool(asked.get("rgb")), asked.get("decode"))
    assert source.classes is not None and source.class_counts is not None
    found: dict[str, Any] = {"kind": "classification", "draw": "random", "train_draw": "random"}
    alike = bool(source.class_counts.all()) or bool(asked.get("fewer_classes"))
    found["fixed_classes"] = "ways" not in asked and alike
    return found | ({"ways": len(source.classes)} if found["fixed_classes"] else {})


def load_folder(path: str, settings: Settings) -> Groups:
    """The tasks of a folder TASK/CLASS/IMAGE; errors as of `load`."""
    return parts_of(read_folder(path, settings.image_size, settings.rgb, settings.decode), settings, path)


@functools.lru_cache(maxsize=1)
def read_folder(path: str, size: tuple[int, int] | None, rgb: bool, decode: Decode | None) -> GroupSource:
    return load_tasks(path, size=size, colour="rgb" if rgb else "grey", in_memory=KEPT[decode])


def read(name: str, path: str, values: Mapping[str, Any]) -> GroupSource:
    """The source of a file, read once for the same options."""
    root = Path(path).expanduser()
    try:
        stamp = root.stat().st_mtime_ns
    except OSError:
        stamp = 0  # reading it tells why
    options = {key: values.get(key) for part in READ[name] for key in part}
    return _read(name, path, stamp, tuple(options.items()))


def separator_of(typed: str | None) -> str | None:
    """What --separator says, which calls what cannot be seen by its name."""
    return {"tab": "\t", "space": " "}.get(typed or "", typed)


@functools.lru_cache(maxsize=2)
def _read(name: str, path: str, stamp: int, options: tuple[tuple[str, Any], ...]) -> GroupSource:
    given = dict(options)
    if name == "table":
        given["separator"] = separator_of(given["separator"])
        targets = given.pop("target")
        return GroupSource.from_table(
            path,
            target=targets[0] if len(targets) == 1 else targets,
            categorical=given.pop("categorical") or (),
            drop_missing=bool(given.pop("drop_missing")),
            decimal=given.pop("decimal") or ".",
            **given,
        )
    arrays = Arrays(path)
    targets = together(arrays, given["target"])
    if name == "windows":
        if len(given["inputs"]) > 1:
            raise InputError(f"windows are cut out of one array, got --inputs {' '.join(given['inputs'])}")
        return GroupSource.from_windows(
            arrays[given["inputs"][0]],
            arrays[given["lengths"]],
            arrays[given["task"]],
            targets,
            window=given["window"],
            hop=given["hop"],
            kind=given["kind"],
            leave_out_short=bool(given["skip_short"]),
            target_names=given["target"],
        )
    inputs = together(arrays, given["inputs"])
    if not isinstance(inputs, dict) and inputs.ndim == 1:
        inputs = inputs[:, None]  # networks take (examples, features)
    return GroupSource(
        inputs,
        targets,
        arrays[given["task"]],
        None if given["order"] is None else arrays[given["order"]],
        kind=given["kind"],
        target_names=given["target"],
    )


def load(name: str, path: str, settings: Settings) -> Groups:
    """The tasks of a run, split and scaled; as its first time has told where `settings.facts` are there.

    Raises:
        InputError: as the source that is read, or as `GroupSource.split`; data that have changed.
    """
    source = read(name, path, {key: getattr(settings, key) for part in READ[name] for key in part})
    return parts_of(source, settings, path)


def parts_of(source: GroupSource, settings: Settings, path: str) -> Groups:
    """The parts of a source; arguments and errors as of `load`."""
    facts = settings.facts
    try:
        parts = _split(source, settings)
    except InputError as error:
        raise InputError(with_shares(str(error), settings.shares, SPOKEN)) from None
    own = {
        "classes": source.classes,
        "inputs": source.input_names,
        "targets": source.target_names,
        "categories": source.categories,
        "shapes": _lists(source.input_shapes),
        "outputs": source.outputs,
    }
    if facts is None:
        scaling = parts.train.fit_scaling() if settings.scale else Scaling()
        facts = {**own, "split": parts.record, "scaling": scaling.to_dict()}
    for key, value in own.items():
        if facts[key] != value:
            raise InputError(
                f"the data of {path} have changed since the run: {key} were {facts[key]}, are {value}"
            )
    parts = parts.scaled(Scaling.from_dict(facts["scaling"]))
    return Groups(
        parts.train,
        parts.validation,
        parts.test,
        Path(path).resolve().stem,
        _origin(source, parts, path),
        facts,
        "" if parts.validation else f"no tasks of {path} are for validation",
    )


def _split(source: GroupSource, settings: Settings) -> GroupSplit:
    if settings.facts is not None:
        record = settings.facts["split"]
        lists = {part: record[part] for part in ("train", "validation", "test") if record[part]}
        return source.split(**lists)._replace(record=record)
    if settings.test_keys is None and settings.validation_keys is None:
        return source.split(settings.shares, seed=settings.split_seed or 0)
    return source.split(settings.shares, validation=settings.validation_keys, test=settings.test_keys)


def _origin(source: GroupSource, parts: GroupSplit, path: str) -> str:
    """Where the data come from, in words."""
    rows, tasks = len(source.rows), len(source)
    told = [f"{path}, {rows} rows in {tasks} tasks of {source.counts.min()} to {source.counts.max()}"]
    if source.dropped:
        told.append(f"{source.dropped} rows with missing values left out")
    if source.left_out:
        told.append(f"{source.left_out} left out")
    if source.classes is not None:
        told.append(f"{len(source.classes)} classes ({few(source.classes, 5)})")
    else:
        told.append(f"regression of {', '.join(source.target_names or ['the targets'])}")
    if source.input_names is not None:
        told.append(f"features {few(source.input_names)}")
    counts = [len(part) if part else 0 for part in parts[:3]]
    told.append(f"split by task {'/'.join(map(str, counts))}")
    return ", ".join(told)


def _lists(shapes: Any) -> Any:
    """Shapes as JSON has them."""
    if isinstance(shapes, dict):
        return {key: _lists(value) for key, value in shapes.items()}
    return [_lists(value) for value in shapes] if isinstance(shapes, tuple) else shapes
