"""A run directory: its files, the lock on it, and the way back from it to a trained learner.

It holds config.json, metrics.jsonl, weights.safetensors, result.json and result.txt; where the run was validated,
weights.safetensors are the best ones and last.safetensors the last. While it is trained, state.safetensors holds what
it goes on from when it was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fomaml.app.algorithms import ALGORITHMS, ANY_WAYS
from fomaml.app.build import build_learner
from fomaml.app.check_settings import read_settings
from fomaml.app.checks import check_classless
from fomaml.app.named import named_again, with_metrics
from fomaml.app.networks import build_model
from fomaml.app.settings import Better, Settings, identity
from fomaml.app.sources import source_of
from fomaml.checkpoint import load_weights
from fomaml.errors import InputError
from fomaml.files import write_text
from fomaml.learning.learner import MetaLearner

CONFIG, METRICS, STATE = "config.json", "metrics.jsonl", "state.safetensors"
WEIGHTS, LAST = "weights.safetensors", "last.safetensors"
RESULT, RESULT_TEXT = "result.json", "result.txt"


def claim(out: Path) -> None:
    """Make the run directory.

    Raises:
        InputError: it holds a run already, or cannot be made.
    """
    if (out / CONFIG).exists():
        raise InputError(f"{out} already holds a run; give another --out, or delete it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the run directory {out}: {error.strerror}") from None


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Holds a run directory, so that no second process trains in it; let go when this process ends, however it does.

    Raises:
        InputError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot open the run directory {out}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process trains in {out}; wait for it, or stop it first") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def keep_metrics(path: Path, iterations: int) -> None:
    """Drop the lines after `iterations`, which will be written again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line of a killed run may be half a line
            if json.loads(line)["iteration"] <= iterations:
                kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))


def is_finished(out: Path) -> bool:
    """Whether the directory has a whole result. One whose baselines are to come has an unfinished one."""
    try:
        return "unfinished" not in json.loads((out / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def load_settings(run: Path) -> Settings:
    """The settings of a run directory.

    Raises:
        InputError: the directory holds no run, or a damaged one.
    """
    path = run / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is damaged: it is not text") from None
    except OSError:
        raise InputError(f"{run} holds no run (no {CONFIG})") from None
    return read_settings(text, str(path))


def load_run(
    run: Path,
    weights: str = "best",
    *,
    model: Any = None,
    loss: Any = None,
    features_of: Any = None,
    features_weights: str | None = None,
    metric: Sequence[str] | None = None,
    metric_direction: Better | None = None,
    accept_changed_code: bool = False,
    **changes,
) -> tuple[Settings, MetaLearner]:
    """The settings, with changes, and the trained learner of a run directory.

    weights: "best" by validation, or "last"; a run without validation has one file, which is both.
    model, loss, features_of: those of the run again where they are the user's own, by name or as the class or function:
        nothing is imported because a file says so. features_weights: their file, where it has moved. metric: others
        than the run's, or the same again; the run's own metrics are taken where they need no code.
    accept_changed_code: take code that is not what the run was made with.

    Raises:
        InputError: the directory holds no finished run, or a damaged one; its own code is not named, or has changed.
    """
    recorded = load_settings(run)
    trained = named_again(
        recorded, run, model=model, loss=loss, features_of=features_of, features_weights=features_weights,
        accept_changed_code=accept_changed_code, going_on=False,
    )  # fmt: skip
    trained = with_metrics(trained, run, metric, metric_direction, accept_changed_code)
    settings = dataclasses.replace(trained, **{k: v for k, v in changes.items() if v is not None})
    if settings.ways != trained.ways and source_of(trained).kind == "regression":
        raise InputError(f"the run in {run} predicts numbers, of which there are no ways: give no --ways")
    if settings.ways != trained.ways and not ALGORITHMS[trained.algorithm].any_ways:
        raise InputError(
            f"the run in {run} learned a head for {trained.ways} ways, got --ways {settings.ways}; only a head made "
            f"of classes takes any number ({', '.join(ANY_WAYS)})"
        )
    check_classless(settings)
    like = dataclasses.replace(
        trained, device=settings.device, model_weights=None
    )  # the network as it was trained, whatever the tasks
    learner = build_learner(like, build_model(like))
    load_weights(weights_file(run, weights), learner, identity(recorded))
    return settings, learner


def weights_file(run: Path, weights: str) -> Path:
    """Where a run directory has its best or last weights."""
    last = run / LAST
    return last if weights == "last" and last.exists() else run / WEIGHTS


def circumstances() -> dict:
    """When, where and with what a result was measured."""
    return {
        "date": str(date.today()),
        "commit": commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


PACKAGE = Path(__file__).resolve().parents[1]


def commit(package: Path = PACKAGE) -> str | None:
    """The commit of the checkout that `package` is the source of; None where it is installed, not checked out.

    An environment may stand inside of another project's repository, whose commit says nothing.
    """
    root = package.parents[1]
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root or root / "src" / "fomaml" != package:
            return None
        return _git(root, "describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
