"""One run: from its settings to a run directory, and back from a run directory to a learner.

A run directory holds config.json, metrics.jsonl, weights.safetensors, result.json and result.txt; where the
run was validated, weights.safetensors are the best ones and last.safetensors the last. While it is
trained, state.safetensors holds what it goes on from when it was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from fomaml.app.build import (
    Data,
    build_learner,
    build_model,
    build_optimizer,
    build_schedule,
    has_bfloat16,
    open_data,
    with_image,
    with_precision,
)
from fomaml.app.judge import describe, judge
from fomaml.app.resolve import check_classless
from fomaml.app.settings import CLASSIFIERS, TrainConfig, from_json, to_json
from fomaml.app.validate import Best, is_due, validate, with_validation
from fomaml.checkpoint import load_progress, load_state, load_weights, save_state, save_weights
from fomaml.engines import choose
from fomaml.errors import InputError
from fomaml.files import write_text
from fomaml.learning.learner import MetaLearner
from fomaml.train import Record, check_width, train


def train_run(
    config: TrainConfig,
    out: Path,
    *,
    say: Callable[[str], None] = print,
    watch: Callable[[Record, float], None] = lambda record, seconds: None,
    resume: bool = False,
) -> dict:
    """Train, evaluate and write the run directory `out`; returns the result, as in result.json.

    config: resolved. say: receives a line on the data, the engine and each validation. watch: receives each
    measured record and the seconds of training so far. resume: `out` holds a run of this config that was
    killed; it goes on from its last checkpoint, and ends bit for bit as it would have.

    Raises:
        InputError: bad data, device or settings, before anything is written; `out` holds a run, or, to
            resume, a finished one.
    """
    data = open_data(config)
    config = with_precision(with_validation(with_image(config, data), data))
    learner = build_learner(config, build_model(config))
    check_width(learner, data.test)
    if not resume:
        claim(out)
    with alone(out):
        if resume and (out / "result.json").exists():
            raise InputError(f"the run in {out} is finished; see {out / 'result.txt'}")
        if not resume:
            write_text(out / "config.json", to_json(config))
        say(f"{data.name}: {data.origin}")
        done, best, clock = _train(config, learner, data, out, say, watch)
        weights = {"kept": "last", "iteration": done}
        if config.validate_every:
            save_weights(out / "last.safetensors", learner)
            load_weights(out / "weights.safetensors", learner)
            facts = {"iteration": best.iteration, "accuracy": best.accuracy, "interval": best.interval}
            weights = {"kept": "best by validation", **facts, "validation_tasks": config.validation_tasks}
        else:
            save_weights(out / "weights.safetensors", learner)
        result = judge(config, learner, data, say)
        result |= {"iterations": done, "weights": weights, "preset": config.preset}
        result |= {f"{name}_seconds": round(spent, 1) for name, spent in dataclasses.asdict(clock).items()}
        result |= {"seed": config.seed, **circumstances()}
        write_text(out / "result.txt", describe(result))
        write_text(out / "result.json", json.dumps(result, indent=2) + "\n")
        (out / "state.safetensors").unlink(missing_ok=True)
    return result


def _train(
    config: TrainConfig, learner: MetaLearner, data: Data, out: Path, say, watch
) -> tuple[int, Best, Clock]:
    """Train from the last checkpoint on, if there is one; the last iteration, the best validation and the time spent.

    At the end the learner has the last weights; out/weights.safetensors the best ones, if there is validation.
    """
    optimizer = build_optimizer(config, learner)
    engine, why = (
        choose(learner, data.train.batch(0, 1), config.compile)
        if config.engine == "auto"
        else (config.engine, "as asked")
    )
    say(f"engine: {engine} ({why})")
    if config.autocast != "none":
        slow = "" if has_bfloat16(config.device) else ", which this device may only imitate, slowly"
        say(f"forward passes in {config.autocast}{slow}")
    say(_validation(config, data))
    state, done, best, clock = out / "state.safetensors", 0, Best(), Clock()
    if state.exists():
        done = load_state(state, learner, optimizer)
        progress = load_progress(state)
        best, clock = Best(**progress.get("best", {})), Clock(**progress.get("clock", {}))
    if (out / "metrics.jsonl").exists():
        _keep_metrics(out / "metrics.jsonl", done)
        say(f"resuming after iteration {done} of {config.iterations}")
    steps = train(
        learner,
        data.train,
        optimizer,
        iterations=config.iterations,
        meta_batch_size=config.meta_batch_size,
        start=done,
        schedule=build_schedule(config),
        measure_every=max(1, config.iterations // 100),
        clip=config.clip,
        engine=engine,
        tasks_at_once=config.tasks_at_once,
        compile=config.compile,
        autocast=None if config.autocast == "none" else getattr(torch, config.autocast),
    )
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as metrics:

        def keep(iteration: int, **facts) -> None:
            metrics.write(json.dumps({"iteration": iteration, **facts, "seconds": clock.training}) + "\n")
            metrics.flush()

        while config.patience is None or best.waited < config.patience:
            with clock.counting("training"):
                record = next(steps, None)
                if record is not None and record.after is not None:  # .item() waits for the device
                    numbers = [x.item() for x in (record.meta_loss, record.before, record.after)]
            if record is None:
                break
            done = record.iteration
            if record.after is not None:
                keep(done, **dict(zip(("meta_loss", "before", "after"), numbers)))
                watch(record, clock.training)
            due = is_due(config, done)
            if due:
                with clock.counting("validation"):
                    found = validate(config, learner, data)
                keep(done, validation=found.mean, interval=found.interval)
                better = best.beaten_by(found, done)
                if better:
                    save_weights(out / "weights.safetensors", learner)
                text = f"{100 * found.mean:.2f} ± {100 * found.interval:.2f} %"
                say(f"iteration {done}: validation accuracy {text}{', the best so far' if better else ''}")
            if due or done % config.checkpoint_every == 0 or done == config.iterations:
                progress = {"best": dataclasses.asdict(best), "clock": dataclasses.asdict(clock)}
                save_state(state, learner, optimizer, done, progress)
    return done, best, clock


@contextlib.contextmanager
def alone(out: Path):
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


@dataclasses.dataclass
class Clock:
    """The seconds spent on each thing, over all the processes that a run took."""

    training: float = 0.0
    validation: float = 0.0

    @contextlib.contextmanager
    def counting(self, what: str):
        began = time.perf_counter()
        yield
        setattr(self, what, getattr(self, what) + time.perf_counter() - began)


def _validation(config: TrainConfig, data: Data) -> str:
    if not config.validate_every:
        return "no validation, as asked" if data.validation else f"no validation: {data.unvalidated}"
    patience = "" if config.patience is None else f", until {config.patience} in a row were no better"
    return f"validation: {config.validation_tasks} tasks every {config.validate_every} iterations{patience}"


def _keep_metrics(path: Path, iterations: int) -> None:
    """Drop the lines after `iterations`, which will be written again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line of a killed run may be half a line
            if json.loads(line)["iteration"] <= iterations:
                kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))


def circumstances() -> dict:
    """When, where and with what a result was measured."""
    root = Path(__file__).resolve().parents[3]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # installed, not checked out
    return {
        "date": str(date.today()),
        "commit": commit,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def claim(out: Path) -> None:
    """Make the run directory.

    Raises:
        InputError: it holds a run already, or cannot be made.
    """
    if (out / "config.json").exists():
        raise InputError(f"{out} already holds a run; give another --out, or delete it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the run directory {out}: {error.strerror}") from None


def load_config(run: Path) -> TrainConfig:
    """The settings of a run directory.

    Raises:
        InputError: the directory holds no run, or a damaged one.
    """
    path = run / "config.json"
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError:
        raise InputError(f"{run} holds no run (no config.json)") from None


def load_run(run: Path, weights: str = "best", **changes) -> tuple[TrainConfig, MetaLearner]:
    """The settings, with changes, and the trained learner of a run directory.

    weights: "best" by validation, or "last"; a run without validation has one file, which is both.

    Raises:
        InputError: the directory holds no finished run, or a damaged one.
    """
    own = load_config(run)
    config = dataclasses.replace(own, **{k: v for k, v in changes.items() if v is not None})
    if config.ways != own.ways and own.algorithm not in CLASSIFIERS:
        raise InputError(
            f"the run in {run} learned a head for {own.ways} ways, got --ways {config.ways}; only a head made of "
            f"classes takes any number ({', '.join(CLASSIFIERS)})"
        )
    check_classless(config)
    like = dataclasses.replace(own, device=config.device)  # the network as it was trained, whatever the tasks
    learner = build_learner(like, build_model(like))
    return config, load_weights(weights_file(run, weights), learner)


def weights_file(run: Path, weights: str) -> Path:
    """Where a run directory has its best or last weights."""
    last = run / "last.safetensors"
    return last if weights == "last" and last.exists() else run / "weights.safetensors"
