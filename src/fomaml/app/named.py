"""What of a run is the user's own: read where it is named, recorded, and compared when it is named again."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from fomaml.app.modules import find_model
from fomaml.app.own import Own, changed, find, is_own, of_object, split
from fomaml.app.settings import Better, Settings
from fomaml.app.wording import option as typed
from fomaml.backbones import LIBRARIES, read_weights
from fomaml.errors import InputError
from fomaml.files import file_digest
from fomaml.metrics import Metric, metric_for, name_of

WEIGHTS = {"model": "model_weights", "features_of": "features_weights"}  # whose weights a file may hold
AGAIN = ("model", "model_weights", "features_of", "features_weights", "loss", "metric")  # to go on with a run
OWN = ("FILE.py:NAME", "package.module:NAME")
# What reads like a value of Python, or of another language, and is none.
NO_WORDS = ("true", "false", "none", "null", "nan", "inf", "yes", "no")


def own_model(settings: Settings) -> bool:
    """Whether the model is the user's own code."""
    return _of_own(settings.model)


def _of_own(name: str) -> bool:
    return name.partition(":")[0] not in LIBRARIES and is_own(name)


def foreign_model(settings: Settings) -> bool:
    """Whether the model is the user's own code or another library's: none of those that options describe."""
    return is_foreign(settings.model)


def is_foreign(name: str) -> bool:
    return ":" in name or is_own(name)


def own_of(settings: Settings, key: str) -> Own:
    """What the user has named here.

    key: "model", "loss", or "metric NAME".

    Raises:
        InputError: it was named in another process alone: nothing is imported because a file says so.
    """
    own = (settings.own or {}).get(key)
    if own is None:
        needed = resume_options(settings)
        raise InputError(
            f"the {key.partition(' ')[0]} of this run is your own code, which is imported only where it is named "
            f"again: add {needed}"
        )
    return own


def parsed(options: Iterable[str]) -> dict[str, Any]:
    """The arguments that `--model-options KEY=VALUE …` gives, each a literal of Python or a plain word.

    Tuples are lists, as config.json has no others.

    Raises:
        InputError: no key, one that is given twice, or a value that is no literal.
    """
    found: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--model-options takes KEY=VALUE, got {text!r}")
        if key in found:
            raise InputError(f"--model-options has {key} twice")
        found[key] = _value(key, value)
    return found


def _value(key: str, text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if re.fullmatch(r"[A-Za-z_][\w./-]*", text) and text.lower() not in NO_WORDS:
            return text
        raise InputError(
            f"--model-options {key}={text} is no value of Python: numbers, 'words', [lists], True, False or None"
        ) from None
    return plain(key, value)


def plain(key: str, value: Any) -> Any:
    """A value as config.json keeps it.

    Raises:
        InputError: of a kind that it has not.
    """
    if isinstance(value, list | tuple):
        return [plain(key, each) for each in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: plain(key, each) for name, each in value.items()}
    if (
        value is None
        or isinstance(value, bool | int | str)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    raise InputError(
        f"the option {key} of the model must be a number, a word, a list, a dict, True, False or None, got {value!r}"
    )


def with_own(settings: Settings) -> Settings:
    """The settings with what the user has just named, and its digests.

    Raises:
        InputError: it is not there, or its import raises an error.
    """
    own: dict[str, Own] = {}
    if own_model(settings):
        own["model"] = find_model(settings.model)
        settings = dataclasses.replace(settings, model=own["model"].name)
    if settings.features_of is not None and _of_own(settings.features_of):
        own["features_of"] = find_model(settings.features_of)
        settings = dataclasses.replace(settings, features_of=own["features_of"].name)
    if settings.loss is not None:
        own["loss"] = read_loss(settings.loss)
        settings = dataclasses.replace(settings, loss=own["loss"].name)
    metrics = []
    for name in settings.metric or ():
        if is_own_metric(name):
            found = read_metric(name, settings.metric_direction)
            name = found.name
            own[f"metric {name}"] = found
        metrics.append(name)
    if settings.metric is not None:
        settings = dataclasses.replace(settings, metric=tuple(metrics))
    code = {key: each.record for key, each in own.items()}
    for network, key in WEIGHTS.items():
        name, weights = getattr(settings, network), getattr(settings, key)
        if name is not None and name.partition(":")[0] in LIBRARIES and weights is None:
            others = "random, or download" if key == "model_weights" else "or download"
            raise InputError(
                f"{name} needs {typed(key)}: a .safetensors file, {others}, by the library itself"
            )
        if key == "features_weights" and weights == "random":
            raise InputError(
                "what --features-of gives must mean something: --features-weights FILE, or download"
            )
        if (record := _weights_record(weights)) is not None:
            code[key] = record
    return dataclasses.replace(settings, own=own or None, code=code or None)


def _weights_record(weights: str | None) -> dict[str, Any] | None:
    """The digest of a file of weights, which is read to see that it is one; None where there is no file."""
    if weights in (None, "random", "download"):
        return None
    path = Path(weights).expanduser()
    read_weights(path)
    return {"name": path.name, "sha256": file_digest(path)}


def is_own_metric(name: str) -> bool:
    """Whether a metric is the user's own; psnr:2 is none."""
    return is_own(name) and not name.lower().startswith("psnr:")


def named_again(
    settings: Settings,
    run: Path,
    *,
    model: Any = None,
    loss: Any = None,
    metric: Sequence[str] | None = None,
    model_weights: str | None = None,
    features_of: Any = None,
    features_weights: str | None = None,
    accept_changed_code: bool = False,
    going_on: bool = True,
) -> Settings:
    """The settings of a run directory with its own code, which the user names again: nothing else is imported.

    model, loss, features_of: names, or the objects themselves. model_weights, features_weights: where the file lies by
        now, if it has moved.
    accept_changed_code: take a file that is not what it was.
    going_on: whether the run goes on, so that its metrics count as well, else see `with_metrics`.

    Raises:
        InputError: what the run needs is not named, something else is, or a file has changed.
    """
    code = dict(settings.code or {})
    asked: dict[str, Any] = {"model": model, "loss": loss, "features_of": features_of}
    missing = [key for key in asked if key in code and asked[key] is None]
    if going_on and metric is None and any(map(is_own_metric, settings.metric or ())):
        missing.append("metric")
    if missing:
        needed = resume_options(settings if going_on else dataclasses.replace(settings, metric=None))
        raise _unnamed(run, missing, needed)
    own: dict[str, Own] = {}
    for key, value in asked.items():
        recorded = getattr(settings, key)
        if value is None:
            continue
        if key in code:
            own[key] = _compared(run, key, code, _find_again(key, value), accept_changed_code)
        elif value != recorded:
            has = f"the {key} {recorded}" if recorded else f"no {typed(key)}"
            raise InputError(f"the run in {run} has {has}, got {typed(key)} {value}")
    if going_on and metric is not None:
        if list(map(_plain_name, metric)) != list(map(_plain_name, settings.metric or ())):
            shown = f"--metric {' '.join(settings.metric)}" if settings.metric else "no --metric"
            raise InputError(f"the run in {run} has {shown}, got --metric {' '.join(metric)}")
        for name, recorded in zip(metric, settings.metric or ()):
            key = f"metric {recorded}"
            if key in code:
                own[key] = _compared(run, key, code, find(name), accept_changed_code)
    if going_on:
        settings = with_weights(settings, run, model_weights)
    settings = with_weights(settings, run, features_weights, "features_weights")
    return dataclasses.replace(settings, own=own or None, code=code or None)


def with_weights(settings: Settings, run: Path, given: str | None, key: str = "model_weights") -> Settings:
    """The settings of a run directory with the file of weights that it began with, where it lies by now.

    Raises:
        InputError: it is not there, or another; the run began with none.
    """
    record = (settings.code or {}).get(key)
    if record is None:
        if given is not None:
            raise InputError(f"the run in {run} began with no file of weights: give no {typed(key)}")
        return settings
    file = given or getattr(settings, key)
    if given is None and not Path(file).expanduser().exists():
        raise InputError(
            f"the file of weights that the run in {run} began with, {file}, is not there any more: say where it lies "
            f"by now, {typed(key)} FILE"
        )
    if (found := _weights_record(file)) is None or found["sha256"] != record["sha256"]:
        raise InputError(f"{file} is not the file of weights that the run in {run} began with; bring it back")
    moved: dict[str, Any] = {key: file}
    return dataclasses.replace(settings, **moved)


def with_metrics(
    settings: Settings,
    run: Path,
    metric: Sequence[Any] | None,
    direction: Better | None,
    accept_changed_code: bool = False,
) -> Settings:
    """The settings of a run directory that is evaluated by other metrics, or by its own again.

    metric: names, or metrics and functions themselves.

    Raises:
        InputError: none is given, and one of the run's is the user's own code; one that has changed.
    """
    code, own = dict(settings.code or {}), dict(settings.own or {})
    before = {name: code.pop(f"metric {name}") for name in settings.metric or () if f"metric {name}" in code}
    if metric is None:
        if before:
            raise _unnamed(run, ["metric"], shlex.join(["--metric", *(settings.metric or ())]), ", or others")
        return settings
    names = []
    direction = direction or settings.metric_direction
    settings = dataclasses.replace(settings, metric_direction=direction)
    for asked in metric:
        if isinstance(asked, str) and not is_own_metric(asked):
            metric_for(F.cross_entropy, asked)
            names.append(asked)
            continue
        if isinstance(asked, str):
            found = find(asked)
        else:
            name = asked.name if isinstance(asked, Metric) else name_of(asked)
            found = Own(name, asked, Path(), "", {})
        found = _checked_metric(found, direction)
        key = f"metric {found.name}"
        same = next((kept for kept in before if _plain_name(kept) == _plain_name(found.name)), None)
        if same is None or not isinstance(asked, str):
            code[key] = found.record
        else:
            code[key] = before[same]
            _compared(run, key, code, found, accept_changed_code)
        own[key] = found
        names.append(found.name)
    return dataclasses.replace(settings, metric=tuple(names), code=code or None, own=own or None)


def _unnamed(run: Path, missing: Sequence[str], needed: str, others: str = "") -> InputError:
    what = " and a ".join("frozen network" if key == "features_of" else key for key in missing)
    return InputError(
        f"the run in {run} has a {what} of your own code, which is imported only where it is named again: add "
        f"{needed}{others}"
    )


def _plain_name(name: str) -> str:
    """The name of a metric, without the folder of its file."""
    return Path(name).name if is_own_metric(name) else name


def _find_again(key: str, value: Any) -> Own:
    if not isinstance(value, str):
        return of_object(value)
    if not is_own(value):
        raise InputError(f"the {key} of the run is your own code, {' or '.join(OWN)}, got {value!r}")
    return find(value) if key == "loss" else find_model(value)


def _compared(run: Path, key: str, code: dict, found: Own, accept: bool) -> Own:
    """What was found, if it is what the run was made with; else it is recorded that it is another, where accepted."""
    recorded = code[key]
    then, now = split(recorded["name"])[1], split(found.name)[1]
    different = changed(recorded, found)
    if then != now:
        different = f"the {key.partition(' ')[0]} was {then}, and is {now}"
    if not different:
        return found
    if not accept:
        raise InputError(
            f"the run in {run} was made with other code: {different}; bring it back, or give --accept-changed-code"
        )
    before = [*recorded.get("before", []), {name: recorded[name] for name in ("name", "sha256")}]
    code[key] = {**found.record, "name": recorded["name"], "before": before}
    return found


def resume_options(settings: Settings) -> str:
    """What has to be said again when a run is resumed: --model FILE.py:NAME and the like; "" mostly."""
    code = settings.code or {}
    words: list[str] = []
    for key in ("model", "features_of", "loss"):
        if key in code:
            words += [typed(key), code[key]["name"]]
    if any(key.startswith("metric ") for key in code):
        words += ["--metric", *(settings.metric or ())]
    return shlex.join(words)


def resume_line(settings: Settings, out: Path) -> str:
    """The command that finishes an interrupted run."""
    logs = settings.log or ()
    log = shlex.join(["--log", *logs]) if any(map(is_own, logs)) else ""
    words = ("fomaml train --resume", shlex.quote(str(out)), resume_options(settings), log)
    return " ".join(filter(None, words))


def read_loss(name: str) -> Own:
    """The loss of this name.

    Raises:
        InputError: it is not there, or no function.
    """
    found = find(name)
    if not callable(found.value) or isinstance(found.value, type):
        raise InputError(
            f"{found.name} must be a function (forward, examples) that returns a scalar, got {found.value!r}"
        )
    return found


def read_metric(name: str, direction: Better | None) -> Own:
    """The user's own metric of this name.

    Raises:
        InputError: it is not there, no metric, or a function of which nobody says whether more is better.
    """
    return _checked_metric(find(name), direction)


def _checked_metric(found: Own, direction: Better | None) -> Own:
    if isinstance(found.value, Metric):
        return found
    if not callable(found.value) or isinstance(found.value, type):
        raise InputError(
            f"{found.name} must be a fomaml.Metric or a function that returns a number, got {found.value!r}"
        )
    if direction is None:
        raise InputError(
            f"{found.name} is a function: say whether more of it is better, --metric-direction higher or lower"
        )
    return found
