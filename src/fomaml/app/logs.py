"""Where the measurements of a run go beside its metrics.jsonl: `--log`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fomaml.app.named import OWN, own_of
from fomaml.app.own import find, is_own, told
from fomaml.app.settings import Settings
from fomaml.errors import InputError

FOLDER = "tensorboard"


class Log(Protocol):
    """What is told each measurement as it is made.

    It is made with the run directory and the number of iterations that are done: a run that is resumed makes again what
    came after its last checkpoint, so that what a log has of later iterations is void.
    """

    def write(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: iteration and seconds; meta_loss, before and after, or validation, interval and
        by_steps, the validation's scores by number of steps.
        """

    def close(self) -> None:
        """No more will come: the training has ended, or was interrupted."""


class TensorBoard:
    """Event files in the run directory, folder tensorboard, for `tensorboard --logdir`.

    Tags are training/meta_loss, before, after and seconds, and validation/score, interval, seconds and after N steps.
    """

    def __init__(self, out: Path, done: int):
        # readers drop what was written of steps from purge_step on, also those that read at this time
        self.writer = _summary_writer()(str(out / FOLDER), purge_step=done + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        kind = "validation" if "validation" in record else "training"
        found = {name: value for name, value in record.items() if name not in ("iteration", "by_steps")}
        found |= {f"after {steps} steps": score for steps, score in record.get("by_steps", {}).items()}
        for key, value in found.items():
            name = "score" if key == "validation" else key
            self.writer.add_scalar(f"{kind}/{name}", value, int(record["iteration"]))
        self.writer.flush()  # as metrics.jsonl is: a run that is killed has lost nothing

    def close(self) -> None:
        self.writer.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--log tensorboard needs it: pip install 'fomaml[tensorboard]'") from None
    return SummaryWriter


LOGS: dict[str, Callable[[Path, int], Log]] = {"tensorboard": TensorBoard}


def with_logs(settings: Settings) -> Settings:
    """The settings with the logs that the user has just named.

    Raises:
        InputError: an unknown name, or one that is there twice; no tensorboard; code of one's own that cannot be
            imported.
    """
    own, names = dict(settings.own or {}), []
    for name in settings.log or ():
        if is_own(name):
            found = find(name)
            name = found.name
            if not callable(found.value):
                raise InputError(f"the log {name} must be a class, got {found.value!r}")
            if isinstance(found.value, type):
                _check(name, found.value)
            own[f"log {name}"] = found
        elif name not in LOGS:
            raise InputError(f"unknown log {name!r}; there are: {', '.join((*LOGS, *OWN))}")
        if name == "tensorboard":
            _summary_writer()
        if name in names:
            raise InputError(f"--log has {name} twice: leave one out")
        names.append(name)
    return dataclasses.replace(settings, log=tuple(names) or None, own=own or None)


def logs_again(settings: Settings, run: Path, log: Sequence[str] | None) -> Settings:
    """The settings of a run that goes on with its logs; those of one's own are named again.

    Raises:
        InputError: what the run has is not named, or others are.
    """
    needed = f"--log {' '.join(settings.log)}" if settings.log else ""
    if log is None and any(map(is_own, settings.log or ())):
        raise InputError(
            f"the run in {run} has a log of your own code, which is imported only where it is named again: add {needed}"
        )
    if log is not None and list(map(_plain, log)) != list(map(_plain, settings.log or ())):
        raise InputError(f"the run in {run} has {needed or 'no --log'}, got --log {' '.join(log)}")
    return settings if log is None else with_logs(dataclasses.replace(settings, log=tuple(log)))


def _plain(name: str) -> str:
    """A name without the folder of its file."""
    return Path(name).name


@contextlib.contextmanager
def opened(settings: Settings, out: Path, done: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What tells a record to all logs of a run.

    Raises:
        InputError: a log of one's own raises an error, or is none.
    """
    with contextlib.ExitStack() as stack:
        logs = []
        for name in settings.log or ():
            own = None if name in LOGS else own_of(settings, f"log {name}")
            path = None if own is None else own.path
            with told(f"the log {name} could not be made", path):
                log = (LOGS[name] if own is None else own.value)(out, done)
            _check(name, log)
            logs.append((name, path, log))
            stack.callback(_closed, name, path, log)

        def write(record: Mapping[str, Any]) -> None:
            for name, path, log in logs:
                with told(f"the log {name} failed", path):
                    log.write(dict(record))

        yield write


def _check(name: str, log: Any) -> None:
    if not callable(getattr(log, "write", None)) or not callable(getattr(log, "close", None)):
        raise InputError(f"the log {name} must have write(record) and close(), got {log!r}")


def _closed(name: str, path: Path | None, log: Log) -> None:
    with told(f"the log {name} could not be closed", path):
        log.close()
