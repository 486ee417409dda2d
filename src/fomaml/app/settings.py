"""The settings of a run, all concrete: what config.json holds. The library itself takes keyword arguments."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fomaml.app.defaults import DEFAULTS, FOLLOWING
from fomaml.choices import OnNonfinite, Policy, Statistics
from fomaml.errors import InputError, shown
from fomaml.sealed import sealed, unsealed

# Of config.json; a run without one has format 0. From format 2 on it has a digest, and so have the files of the run.
FORMAT = 2
DIGESTS = 2

Question = Literal["new-labels", "new-digits"]
Kind = Literal["classification", "regression"]  # of tasks
Draw = Literal["random", "first", "anytime"]
Split = Literal["maml", "vinyals", "background-evaluation"]
Filter = Literal["lanczos", "nearest", "box", "bilinear"]
Augmentation = Literal["none", "rotations", "turns", "warps"]
Decode = Literal["once", "drawn"]
TestAugmentation = Literal["none", "turns"]
NormPolicy = Policy
NormParameters = Literal["scale-shift", "shift"]
Adapted = Literal["all", "no-norm"]
InnerLoss = Literal["mean", "summed"]
InnerOptimizer = Literal["sgd", "adam", "carried-adam"]
LearnedRates = Literal["none", "per-step", "elementwise"]
Schedule = Literal["constant", "cosine", "linear"]
Precision = Literal["none", "bfloat16", "auto"]
Compiled = Literal["auto", "yes", "no"]
BaselineSize = Literal["run", "full"]
Part = Literal["test", "validation"]
Weights = Literal["best", "last"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Settings:
    """Every setting of one run; `settle` makes it of what was given. What each means: the *_options.py.

    None stands for "no such thing" (no clipping, no patience, a question of a source that asks none), but for three
    that only the data can tell: `validate_every`, `facts` and `image`, the shape of an image, are filled in when a run
    begins.
    """

    source: str
    preset: str | None
    out: Path | None
    # data
    data_root: Path | None
    question: Question | None
    split: Split | None
    resize: Filter | None
    image_size: tuple[int, int] | None
    rgb: bool
    augment: Augmentation
    jitter: float
    # tasks
    ways: int
    shots: int
    query_shots: int
    train_ways: int
    train_shots: int
    test_query_shots: int
    test_augment: TestAugmentation
    test_copies: int
    test_jitter: float
    # the algorithm and its network
    algorithm: str
    choices: dict[str, float] | None
    model: str
    channels: tuple[int, ...]
    norm_policy: NormPolicy
    norm_parameters: NormParameters
    adapt: Adapted
    learn_rates: LearnedRates
    rates_lr: float | None
    multi_step_iterations: int | None
    # the inner loop
    inner_lr: float
    inner_steps: int
    inner_loss: InnerLoss
    inner_optimizer: InnerOptimizer
    inner_momentum: float
    inner_batch_size: int | None
    test_inner_batch_size: int | None
    # the outer loop
    iterations: int
    seconds: float | None
    meta_lr: float
    meta_batch_size: int
    schedule: Schedule
    weight_decay: float
    clip: float | None
    validate_every: int | None
    validation_tasks: int
    patience: int | None
    checkpoint_every: int
    # evaluation
    test_tasks: int
    test_steps: tuple[int, ...]
    statistics: Statistics
    baselines: bool
    # the machine
    engine: str
    tasks_at_once: int | None
    compile: Compiled
    autocast: Precision
    seed: int
    device: str
    image: tuple[int, ...] | None = None
    # Later than format 1. Of a folder: the shares of its parts, the images without which a class is left out, and when
    # they are decoded.
    shares: tuple[float, float, float] | None = None
    skip_small_classes: int | None = None
    decode: Decode | None = None
    baseline_size: BaselineSize = "full"  # as they all were
    # Of tasks that are groups of rows, see grouped.py: what is read of a file, and how tasks are made of it.
    task: str | None = None
    target: tuple[str, ...] | None = None
    order: str | None = None
    features: tuple[str, ...] | None = None
    categorical: tuple[str, ...] | None = None
    inputs: tuple[str, ...] | None = None
    lengths: str | None = None
    window: int | None = None
    hop: int | None = None
    kind: Kind | None = None
    drop_missing: bool = False
    skip_short: bool = False
    separator: str | None = None
    decimal: str | None = None
    draw: Draw | None = None
    train_draw: Draw | None = None
    gap: int | None = None
    query_all: bool = False
    test_keys: tuple[str, ...] | None = None
    validation_keys: tuple[str, ...] | None = None
    split_seed: int | None = None
    skip_small_groups: bool = False
    fewer_classes: bool = False
    scale: bool | None = None
    fixed_classes: bool | None = None  # the classes of the data, the same ones in all tasks
    facts: dict[str, Any] | None = None  # what the data have told: columns, classes, split, scaling
    # Of a model of the user's own, or of another library: its arguments, its head, the file of its weights.
    model_options: dict[str, Any] | None = None
    model_weights: str | None = None  # a file, or "random" or "download"
    head: str | None = None
    # A network that is not learned: its name, its weights, the layer, and the folder that keeps what it gives.
    features_of: str | None = None
    features_weights: str | None = None
    features_layer: str | None = None
    features_in: Path | None = None
    output: str | int | None = None  # what of the model's outputs is judged
    loss: str | None = None
    metric: tuple[str, ...] | None = None
    metric_direction: Better | None = None
    log: tuple[str, ...] | None = None  # where measurements go beside metrics.jsonl
    checkpoint_seconds: float = 60.0
    on_nonfinite: OnNonfinite = "stop"
    data: dict[str, Any] | None = None  # which data they are, see data_identity.py
    changed: tuple[dict[str, Any], ...] | None = (
        None  # what was changed when the run went on, see `changed_settings`
    )
    format: int = FORMAT
    same_bits: bool = False  # for any number of processes, each of which has so many threads
    threads: int | None = None
    # What is compared of the user's own files, by option, see own.py; and what was found there, which is never written:
    # a run that is read from its directory has it only where the user has named it again.
    code: dict[str, dict[str, Any]] | None = None
    own: dict[str, Any] | None = dataclasses.field(default=None, compare=False, repr=False)


# What may be another when a run goes on or is judged: where it lies and is computed, and what only judges it.
LATER = (
    "shares", "skip_small_classes", "task", "target", "order", "features", "categorical", "inputs", "lengths",
    "window", "hop", "kind", "drop_missing", "skip_short", "separator", "decimal", "draw", "train_draw", "gap",
    "query_all", "test_keys", "validation_keys", "split_seed", "skip_small_groups", "fewer_classes", "scale",
    "fixed_classes", "facts", "model_options", "head", "features_of", "features_layer", "output", "loss", "metric",
    "metric_direction", "data", "same_bits", "threads",
)  # fmt: skip
MAY_CHANGE = frozenset(
    {
        "out",
        "data_root",
        "decode",
        "device",
        "test_tasks",
        "baselines",
        "baseline_size",
        "model_weights",
        "features_weights",
        "features_in",
        "log",
        "checkpoint_seconds",
        "on_nonfinite",
        "changed",
        "code",
        "own",
    }
)


def identity(settings: Settings) -> dict[str, Any]:
    """What a run's weights are made by, JSON-able: its files of tensors carry a digest of it."""
    values = vars(settings)
    added = {
        name for name in LATER if values[name] is None or values[name] is False
    }  # as weights from before
    kept = {name: value for name, value in values.items() if name not in MAY_CHANGE | added}
    for change in reversed(settings.changed or ()):  # as the run was begun
        if change["setting"] in kept:
            kept[change["setting"]] = change["from"]
    if settings.format < DIGESTS:
        del kept["format"]
    kept["compile"] = {"yes": True, "no": False}.get(kept["compile"], kept["compile"])  # as it was at first
    return json.loads(json.dumps(kept, default=str))


def changed_settings(settings: Settings, iteration: int, **changes: Any) -> Settings:
    """The settings with others, of which is recorded at which iteration, from what and to what they were changed."""
    record = [
        {"iteration": iteration, "setting": name, "from": getattr(settings, name), "to": value}
        for name, value in changes.items()
        if value != getattr(settings, name)
    ]
    if not record:
        return settings
    return dataclasses.replace(settings, **changes, changed=(*(settings.changed or ()), *record))


def to_json(settings: Settings) -> str:
    """The settings as an indented JSON object, with a digest from format 2 on."""
    values = {name: value for name, value in vars(settings).items() if name != "own"}
    values = {"format": settings.format, **values}
    if settings.format < DIGESTS:
        return json.dumps(values, indent=2, default=str) + "\n"
    return sealed(values)


def from_json(text: str, origin: str) -> Settings:
    """Read `to_json` back, or what an earlier format wrote.

    Raises:
        InputError: not the JSON of a run's settings; `origin` says where it was read.
    """
    try:
        values = unsealed(text)
        written = values.get("format", 0)
        if isinstance(written, bool) or written not in range(FORMAT + 1):
            raise ValueError(f"format {written!r} is newer than this version, which reads up to {FORMAT}")
        if written >= DIGESTS:
            unsealed(text, required=True)
        values["format"] = written
        if written == 0:
            values = _of_format_0(values)
        for name in ("out", "data_root", "features_in"):
            given = values.get(name)
            values[name] = Path(given) if isinstance(given, str) and given else given
        if isinstance(values.get("compile"), bool):  # as it was at first
            values["compile"] = "yes" if values["compile"] else "no"
        for name, value in values.items():
            if name not in ("facts", "model_options", "code", "data") and isinstance(value, list):
                values[name] = tuple(value)
        _check_names(values)
        return Settings(**values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{origin} is not the config of a run ({error})") from None


def _check_names(values: dict[str, Any]) -> None:
    """Raise `ValueError` where a setting is unknown or missing."""
    fields = {field.name: field for field in dataclasses.fields(Settings) if field.name != "own"}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no setting {shown(name)}{hint}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"the setting {name!r} is missing")


def _of_format_0(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of format 0, which had no number, under today's names; options it does not name had their defaults."""
    values = dict(values)
    values.pop("resume", None)
    for old, new in (("test_statistics", "statistics"), ("norm_statistics", "norm_policy")):
        if old in values:
            values[new] = values.pop(old)
    if values.get("statistics") == "inductive":
        values["statistics"] = "support"
    others: dict[str, Any] = {"split": None, "resize": None, "image_size": None, "rgb": False, "image": None}
    others |= {"validation_tasks": 200, "baseline_size": "full", "compile": "no"}
    values = {**DEFAULTS, **others, **values, "question": values["question"] or None}
    return {**{name: values[other] for name, other in FOLLOWING.items()}, **values}
