"""A run directory: its files, the lock on it, and the way back from it to a trained learner.

It holds config.json, metrics.jsonl, weights.safetensors, result.json and result.txt; where the run was validated,
weights.safetensors are the best ones and last.safetensors the last. While it is trained, state.safetensors holds what
it goes on from when it was killed, and before.safetensors the state before that, should the newest be damaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import subprocess
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fomaml import regular
from fomaml.app.algorithms import ALGORITHMS, ANY_WAYS
from fomaml.app.build import build_learner
from fomaml.app.check_settings import read_settings
from fomaml.app.checks import check_classless
from fomaml.app.device import device_facts
from fomaml.app.named import named_again, with_metrics
from fomaml.app.networks import build_model
from fomaml.app.settings import DIGESTS, Better, Settings, identity
from fomaml.app.sources import source_of
from fomaml.checkpoint import load_weights
from fomaml.errors import InputError
from fomaml.files import sweep, write_text
from fomaml.learning.learner import MetaLearner
from fomaml.sealed import finite, unsealed

CONFIG, METRICS = "config.json", "metrics.jsonl"
STATE, STATE_BEFORE = "state.safetensors", "before.safetensors"
WEIGHTS, LAST = "weights.safetensors", "last.safetensors"
RESULT, RESULT_TEXT = "result.json", "result.txt"
CHECKSUM = "crc32"


OF_A_RUN = (CONFIG, STATE, STATE_BEFORE, WEIGHTS, LAST, METRICS, RESULT, RESULT_TEXT, "calibration.json")


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Makes a run directory and holds it, see `alone`; one that is still empty after an error is deleted again.

    Raises:
        InputError: it holds a run or what is left of one, another process holds it, or it cannot be made.
    """
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the run directory {out}: {error.strerror}") from None
    try:
        with alone(out):
            if left := [name for name in OF_A_RUN if (out / name).exists()]:
                what = "a run" if CONFIG in left else f"what is left of a run, {', '.join(left)}"
                raise InputError(f"{out} already holds {what}; give another --out, or delete it")
            yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                out.rmdir()
        raise


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
        sweep(out)
        yield
    finally:
        os.close(handle)


def beside(out: Path) -> dict[str, str]:
    """The checksums of the other figures of a run, which result.json keeps."""
    read = {name: regular.read_bytes(out / name, regular.LOG) for name in (RESULT_TEXT, METRICS)}
    return {f"{name} crc32": checksum(data) for name, data in read.items()}


def keep_metrics(path: Path, iterations: int, validated: int) -> tuple[int, int]:
    """Drop what will be written again, measurements after `iterations` and validations after `validated`, and damaged
    lines. Returns the number of lines that are kept, and of damaged ones.

    The last line of a killed run may be half a line, which is no damage.
    """
    data = regular.read_bytes(path, regular.LOG) if path.exists() else b""
    kept, damaged = [], 0
    for line in data.splitlines(keepends=True):
        found = parsed_line(line)
        if found is None:
            damaged += line.endswith(b"\n")
        elif found["iteration"] <= (validated if "validation" in found else iterations):
            kept.append(line.decode())
    write_text(path, "".join(kept))
    return len(kept), damaged


def written_line(record: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl: the record, and a checksum of it."""
    text = json.dumps(finite(record))
    return f'{text[:-1]}, "{CHECKSUM}": "{checksum(text.encode())}"}}\n'


def checked_line(line: bytes | str) -> dict[str, Any]:
    """The record of a line of `written_line`; of earlier versions, unchecked.

    Raises:
        ValueError: it is damaged.
    """
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("expected an object")
    told = found.pop(CHECKSUM, None)
    if told not in (None, checksum(json.dumps(found).encode())):
        raise ValueError("it holds something else than what was written")
    return found


def parsed_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line of metrics.jsonl; None of one that is damaged, or is not whole."""
    try:
        if len(line) > regular.LINE:
            return None
        kept = checked_line(line)
        found: dict[str, Any] = {key: math.nan if value is None else value for key, value in kept.items()}
        by_steps = found.get("by_steps", {})
        numbers = [value for key, value in found.items() if key != "by_steps"]
        numbers += [value for value in by_steps.values() if value is not None]
        good = "iteration" in found and all(map(is_number, numbers))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return found if good and line.endswith(b"\n") else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def checksum(data: bytes) -> str:
    """The CRC-32 of some bytes, in hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def begun_before(settings: Settings, out: Path) -> str:
    """Whether a folder holds a run of these very settings, "begun" or "finished"; else ""."""
    if not (out / CONFIG).exists() or identity(load_settings(out)) != identity(settings):
        return ""
    return "finished" if is_finished(out) else "begun"


def read_result(out: Path) -> dict:
    """What result.json says."""
    return json.loads(regular.read_text(out / RESULT))


def is_finished(out: Path) -> bool:
    """Whether the directory has a whole result. One whose baselines are to come has an unfinished one.

    Raises:
        InputError: it has a damaged one.
    """
    try:
        return "unfinished" not in unsealed(regular.read_text(out / RESULT))
    except OSError:
        return False
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"{out / RESULT} is damaged ({error}); fomaml evaluate judges the run again"
        ) from None


def load_settings(run: Path) -> Settings:
    """The settings of a run directory.

    Raises:
        InputError: the directory holds no run, or a damaged one.
    """
    path = run / CONFIG
    try:
        text = regular.read_text(path)
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
    load_weights(weights_file(run, weights), learner, identity(recorded), recorded.format >= DIGESTS)
    return settings, learner


def weights_file(run: Path, weights: str) -> Path:
    """Where a run directory has its best or last weights."""
    last = run / LAST
    return last if weights == "last" and last.exists() else run / WEIGHTS


def circumstances(device: str = "cpu") -> dict:
    """When, where and with what a result was measured on a device."""
    return {
        "date": str(date.today()),
        "commit": commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **device_facts(device),
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
