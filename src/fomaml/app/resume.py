"""The settings that a run goes on with: its own, and the few that may be others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fomaml.app import rundir
from fomaml.app.check_settings import check_settings
from fomaml.app.logs import logs_again
from fomaml.app.named import AGAIN, named_again
from fomaml.app.rundir import load_settings
from fomaml.app.settings import Settings, changed_settings
from fomaml.app.wording import option as typed
from fomaml.errors import InputError
from fomaml.files import load_tensors

# What a run may go on with otherwise: how far, on what, where its data lie, how it is saved and judged. It is recorded.
CHANGEABLE = (
    "iterations",
    "device",
    "compile",
    "data_root",
    "test_tasks",
    "checkpoint_seconds",
    "on_nonfinite",
)


def resumed_settings(out: Path, asked: dict[str, Any]) -> Settings:
    """The settings of a run directory that goes on. asked: the options that were given beside --resume.

    Raises:
        InputError: no run is there; an option that does not go with it; code that has changed or is not named.
    """
    asked = dict(asked)
    again = {name: asked.pop(name, None) for name in AGAIN}
    changes = {name: asked.pop(name) for name in CHANGEABLE if name in asked}
    log, accept = asked.pop("log", None), asked.pop("accept_changed_code", False)
    if asked:
        raise InputError(
            f"--resume takes the settings of the run, and no {typed(min(asked))}; what may be another is "
            f"{', '.join(map(typed, CHANGEABLE))}; --model, --features-of, --loss, --metric and --log are named again "
            "where they are your own code, and files of weights where they have moved"
        )
    settings = named_again(load_settings(out), out, **again, accept_changed_code=accept)
    settings = logs_again(settings, out, log)
    if "iterations" in changes and settings.seconds is not None:
        raise InputError(f"the run in {out} is limited by --seconds: give no --iterations")
    if changes:
        settings = changed_settings(settings, _iteration(out), **changes)
        check_settings(settings)
    return settings


def _iteration(out: Path) -> int:
    """That of the newest whole state; 0 where there is none, which the run itself will tell."""
    for name in (rundir.STATE, rundir.STATE_BEFORE):
        try:
            return load_tensors(out / name)[1]["iteration"]
        except (InputError, KeyError):
            continue
    return 0
