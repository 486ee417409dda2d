"""What a run directory tells without its data: settings, curves, result, calibrations. It only reads."""

from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fomaml import regular
from fomaml.app.calibrate import Known, read_calibration
from fomaml.app.checks import OF_SOURCES
from fomaml.app.commands import TrainOptions, headings
from fomaml.app.defaults import DEFAULTS, FOLLOWING
from fomaml.app.judge import describe
from fomaml.app.named import foreign_model
from fomaml.app.rundir import (
    METRICS,
    RESULT,
    RESULT_TEXT,
    checksum,
    is_number,
    load_settings,
    parsed_line,
)
from fomaml.app.scores import measured, metric_in
from fomaml.app.search import words_of
from fomaml.app.settings import DIGESTS, Settings
from fomaml.app.settle import ASKED, settle
from fomaml.app.sources import source_of
from fomaml.errors import InputError
from fomaml.metrics import LOSS, Metric
from fomaml.metrics import METRICS as KNOWN
from fomaml.sealed import unsealed

OF_READING = (  # how a file is read: without it nothing is settled
    "task", "target", "order", "features", "categorical", "inputs", "lengths", "window", "hop", "drop_missing",
    "skip_short", "separator", "image_size", "rgb",
)  # fmt: skip
FOUND_OUT = {"out", "log"}  # the new run's own
OF_OWN_CODE = (
    "model",
    "model_options",
    "model_weights",
    "head",
    "output",
    "loss",
    "metric",
    "metric_direction",
)


@dataclass(frozen=True)
class Record:
    """A run as its directory tells it.

    lines: of metrics.jsonl. result: of result.json; None where the run is not finished.
    """

    path: Path
    settings: Settings
    lines: list[dict[str, Any]]
    result: dict[str, Any] | None
    calibrations: list[Known]

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """The measured iterations."""
        return [line for line in self.lines if "meta_loss" in line]

    @cached_property
    def validations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "validation" in line]

    @property
    def metric(self) -> Metric:
        """The metric of the headline, for its name, direction and unit: one's own is not imported for that."""
        if self.result is not None:
            return metric_in(self.result)
        if self.settings.metric is None:
            return source_of(self.settings).metric if self.settings.loss is None else LOSS
        name = self.settings.metric[0]
        direction: Any = -1 if self.settings.metric_direction == "lower" else 1
        return KNOWN.get(name) or Metric(name.rpartition(":")[2], LOSS.score, direction, "")

    @property
    def measured(self) -> str:
        """What its scores are, in words."""
        return self.result["measured"] if self.result is not None else measured(self.settings, self.metric)

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Name → (iteration, value) of what was measured in training, in the metric's unit; numbers that are finite."""
        scale = self.metric.scale
        found = {
            "meta-loss": [(line["iteration"], line["meta_loss"]) for line in self.training],
            "before adaptation": _points(self.training, "before", scale),
            "after adaptation": _points(self.training, "after", scale),
            "validation": _points(self.validations, "validation", scale),
        }
        return {
            name: [point for point in points if math.isfinite(point[1])]
            for name, points in found.items()
            if points
        }


def _points(lines: list[dict[str, Any]], key: str, scale: float) -> list[tuple[float, float]]:
    return [(line["iteration"], scale * line[key]) for line in lines if line.get(key) is not None]


def read_record(run: Path) -> Record:
    """Read a run directory, finished or not.

    Raises:
        InputError: there is no run, or a file of it is damaged.
    """
    run = run.expanduser()
    settings = load_settings(run)
    checked = settings.format >= DIGESTS
    record = Record(
        run, settings, _lines(run / METRICS), read_result(run, checked), read_calibration(run, checked)
    )
    if record.result is not None:
        record.result.setdefault("measured", measured(settings, record.metric))  # results of earlier versions
    return record


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        data = regular.read_bytes(path, regular.LOG)
    except OSError:
        return []
    found = []
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        own = parsed_line(line)
        if own is not None:
            found.append(own)
        elif line.endswith(b"\n"):  # else the end of a run that is being written, or was killed
            raise InputError(f"{path} is damaged: line {number} is no line of a run's metrics")
    return found


def read_result(run: Path, checked: bool = False) -> dict[str, Any] | None:
    """What result.json holds, nan where it has null; None where there is none. checked: it must have a digest.

    Raises:
        InputError: it is damaged, or result.txt is not the text that was written beside it.
    """
    path = run / RESULT
    try:
        found = unsealed(regular.read_text(path), required=checked)
        if not found["rows"] or not found["protocol"] or not isinstance(found["differences"], list):
            raise KeyError
        found["tasks"], found["steps"], found["name"]
        found |= {name: _number(found[name]) for name in (found["metric"], "interval")}
        for row in [*found["rows"], *found["differences"]]:
            row |= {name: _number(row[name]) for name in ("mean", "interval")}
            if not isinstance(row.get("label", row.get("to")), str):
                raise TypeError
            _number(row.get("steps", 0))
        for name in ("name", "measured", "unit"):
            if not isinstance(found.get(name, ""), str):
                raise TypeError
        for name, value in found.items():
            if name.endswith("_seconds") and not is_number(value):
                raise TypeError
        if weights := found.get("weights"):
            weights["kept"], weights["iteration"]
        metric_in(found)
        describe(
            {"measured": "", **found}
        )  # which looks at the rest; results of earlier versions have no such word
    except InputError:
        raise
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged: it is not the result of a run") from None
    for name in (RESULT_TEXT, METRICS):
        told, file = found.pop(f"{name} crc32", None), run / name
        if told is not None and file.exists() and checksum(regular.read_bytes(file, regular.LOG)) != told:
            raise InputError(f"{file} is not what was written beside {RESULT}: bring it back, or delete it")
    return found


def _number(value: Any) -> float:
    if value is None:  # what was not finite
        return math.nan
    if not is_number(value):
        raise TypeError
    return value


# --- how to repeat it -----------------------------------------------------------------------------


def command(settings: Settings) -> str:
    """The line that trains such a run again: the options without which the settings would be others.

    Nothing of the user's own code is imported for it.
    """
    typed = {name for names in headings(TrainOptions).values() for name in names} & ASKED - FOUND_OUT
    wanted = {name: getattr(settings, name) for name in typed}
    own: dict[str, Any] = {}
    if settings.code or foreign_model(settings):
        own = {name: wanted.pop(name) for name in OF_OWN_CODE}
        own["model_options"] = tuple(
            f"{name}={value if isinstance(value, str) else repr(value)}"
            for name, value in (settings.model_options or {}).items()
        )
    if wanted["validate_every"] == max(1, settings.iterations // 10):
        del wanted["validate_every"]  # as the data decide
    asked: dict[str, Any] = {"source": settings.source}
    asked |= {name: wanted[name] for name in ("preset", *OF_READING) if wanted[name] not in (None, False)}
    # what these bring with them changes what the others are by default
    leaders = ("kind", "algorithm", "question", "shots", "ways", "iterations", "query_shots")
    order = [*leaders, *sorted(wanted.keys() - {*leaders, *FOLLOWING, "validation_tasks"})]
    order += [*(name for name in FOLLOWING if name in wanted), "validation_tasks"]
    try:
        found = settle(**asked)
        for name in order:
            if wanted.get(name) not in (None, getattr(found, name)):
                asked[name] = True if name == "skip_small_classes" else wanted[name]
                found = settle(**asked)
        if found.fixed_classes != settings.fixed_classes:
            asked["ways"] = settings.ways
    except InputError:  # the data decide on settings, and are not here
        plain = {**DEFAULTS, **OF_SOURCES}
        asked |= {
            name: value
            for name, value in wanted.items()
            if value not in (None, plain.get(name)) and value != wanted.get(FOLLOWING.get(name, ""))
        }
        if settings.fixed_classes:
            asked.pop("ways", None)
        if settings.skip_small_classes:
            asked["skip_small_classes"] = True
    if settings.seconds is not None:
        asked.pop("iterations", None)
    words = words_of(asked | {name: value for name, value in own.items() if value not in (None, ())})
    return "fomaml train " + shlex.join(words)


def settings_rows(settings: Settings) -> list[tuple[str, str, str]]:
    """(heading, name, value) of all settings that stand for something."""
    rows = []
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    named = [(heading or "Run", name) for heading, names in headings(TrainOptions).items() for name in names]
    for heading, name in named:
        value = values.get(name)
        if value is not None and name not in FOUND_OUT:
            shown = " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            rows.append((heading, name, shown))
    return rows
