"""What a run directory tells without its data: settings, curves, result, calibrations. It only reads."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fomaml.app.calibrate import Known, read_calibration
from fomaml.app.checks import OF_SOURCES
from fomaml.app.commands import TrainOptions, headings
from fomaml.app.defaults import DEFAULTS, FOLLOWING
from fomaml.app.named import foreign_model
from fomaml.app.rundir import METRICS, RESULT, load_settings
from fomaml.app.scores import measured, metric_in
from fomaml.app.search import words_of
from fomaml.app.settings import Settings
from fomaml.app.settle import ASKED, settle
from fomaml.app.sources import source_of
from fomaml.errors import InputError
from fomaml.metrics import LOSS, Metric
from fomaml.metrics import METRICS as KNOWN

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
    record = Record(run, settings, _lines(run / METRICS), _result(run / RESULT), read_calibration(run))
    if record.result is not None:
        record.result.setdefault("measured", measured(settings, record.metric))  # results of earlier versions
    return record


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    except ValueError:
        raise InputError(f"{path} is damaged: it is not text; expected a JSON object a line") from None
    found = []
    whole = text.endswith("\n")
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            own = json.loads(line)
            by_steps = own.get("by_steps", {})
            numbers = [value for key, value in own.items() if key != "by_steps"] + list(by_steps.values())
            if "iteration" not in own or not all(map(_is_number, numbers)):
                raise ValueError
            found.append(own)
        except (ValueError, TypeError, AttributeError):
            if number == len(lines) and not whole:  # a run that is being written, or was killed
                break
            raise InputError(f"{path} is damaged: line {number} is no line of a run's metrics") from None
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _result(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not found["rows"] or not found["protocol"] or not isinstance(found["differences"], list):
            raise KeyError
        found[found["metric"]], found["interval"], found["tasks"], found["steps"], found["name"]
        for row in found["rows"]:
            if not (
                _is_number(row["mean"]) and _is_number(row["interval"]) and isinstance(row["label"], str)
            ):
                raise TypeError
        metric_in(found)
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, IndexError):
        raise InputError(f"{path} is damaged: it is not the result of a run") from None
    return found


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
