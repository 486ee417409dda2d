"""One run: from its settings to a run directory, and back from a run directory to a learner.

A run directory holds config.json, metrics.jsonl, weights.safetensors, result.json and result.txt.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from fomaml.build import (
    NAMES,
    Data,
    build_learner,
    build_model,
    build_optimizer,
    head_name,
    open_data,
    with_image,
)
from fomaml.checkpoint import load_state, load_weights, save_state, save_weights, write_text
from fomaml.config import TrainConfig, from_json, to_json
from fomaml.data.source import ClassSource
from fomaml.engines import choose
from fomaml.errors import InputError
from fomaml.evaluate import estimate, evaluate, fine_tune, nearest_centroid, pretrain
from fomaml.learner import MetaLearner
from fomaml.models import BatchNorm
from fomaml.report import table, verdict
from fomaml.train import Record, check_width, cosine, train


def train_run(
    config: TrainConfig,
    out: Path,
    *,
    say: Callable[[str], None] = print,
    watch: Callable[[Record, float], None] = lambda record, seconds: None,
    resume: bool = False,
) -> dict:
    """Train, evaluate and write the run directory `out`; returns the result, as in result.json.

    config: resolved. say: receives a line on the data and the engine. watch: receives each measured
    record and the seconds spent so far. resume: `out` holds a run of this config that was killed; it goes on
    from its last checkpoint, and ends bit for bit as it would have.

    Raises:
        InputError: bad data, device or settings, before anything is written; `out` holds a run.
    """
    data = open_data(config)
    config = with_image(config, data)
    learner = build_learner(config, build_model(config))
    optimizer = build_optimizer(config, learner)
    check_width(learner, data.test)
    engine, why = (
        choose(learner, data.train.batch(0, 1)) if config.engine == "auto" else (config.engine, "as asked")
    )
    state, done, spent = out / "state.safetensors", 0, 0.0
    if resume:
        done = load_state(state, learner, optimizer) if state.exists() else 0
        spent = _keep_metrics(out / "metrics.jsonl", done)
    else:
        claim(out)
        write_text(out / "config.json", to_json(config))
    say(f"{data.name}: {data.origin}")
    say(f"engine: {engine} ({why})")
    if resume:
        say(f"resuming after iteration {done} of {config.iterations}")
    schedule = cosine(config.iterations) if config.schedule == "cosine" else None
    began = time.perf_counter() - spent
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        for record in train(
            learner,
            data.train,
            optimizer,
            iterations=config.iterations,
            meta_batch_size=config.meta_batch_size,
            start=done,
            schedule=schedule,
            measure_every=max(1, config.iterations // 100),
            engine=engine,
        ):
            if record.after is not None:
                seconds = time.perf_counter() - began
                numbers = [x.item() for x in (record.meta_loss, record.before, record.after)]
                line = dict(zip(("meta_loss", "before", "after"), numbers))
                metrics.write(json.dumps({"iteration": record.iteration, **line, "seconds": seconds}) + "\n")
                metrics.flush()
                watch(record, seconds)
            if record.iteration % config.checkpoint_every == 0:
                save_state(state, learner, optimizer, record.iteration)
    seconds = time.perf_counter() - began
    save_weights(out / "weights.safetensors", learner)
    result = judge(config, learner, data, say) | {"training_seconds": round(seconds, 1)}
    result |= {"seed": config.seed, **circumstances()}
    write_text(out / "result.txt", describe(result))
    write_text(out / "result.json", json.dumps(result, indent=2) + "\n")
    state.unlink(missing_ok=True)
    return result


def _keep_metrics(path: Path, iterations: int) -> float:
    """Drop the lines after `iterations`, which will be written again; returns the seconds spent until there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line of a killed run may be half a line
            record = json.loads(line)
            if record["iteration"] <= iterations:
                kept.append((line, record["seconds"]))
    write_text(path, "".join(line + "\n" for line, _ in kept))
    return kept[-1][1] if kept else 0.0


def judge(config: TrainConfig, learner: MetaLearner, data: Data, say=lambda line: None) -> dict:
    """Evaluate a trained learner, and the baselines, on the same unseen tasks."""
    say(f"evaluating on {config.test_tasks} unseen tasks")
    tasks = config.test_tasks
    name = NAMES[config.algorithm]
    found = evaluate(learner, data.test, tasks=tasks, at_steps=config.test_steps)
    rows = [_row(f"{name}, {_steps(steps)}", found[steps], steps=steps) for steps in found]
    headline = found[config.test_steps[-1]]
    differences = []
    for label, scores, facts in baselines(config, data, say) if config.baselines else ():
        rows.append(_row(label, scores, **facts))
        paired = estimate(headline - scores)
        differences.append({"to": label, "mean": paired.mean, "interval": paired.interval})
    return summary(config, learner, data, found, rows, differences)


def summary(config, learner, data, found, rows=None, differences=(), inductive=False) -> dict:
    """The result as JSON-able facts: the headline figure, the protocol, the rows and the paired differences."""
    steps = max(found)
    name = NAMES[config.algorithm]
    headline = estimate(found[steps])
    metric = "loss" if config.source == "sinusoid" else "accuracy"
    facts = protocol(config, data, learner) | {"inner_steps": steps}
    if inductive:
        facts["batch_statistics"] = "inductive"
    if rows is None:
        rows = [_row(f"{name}, {_steps(k)}", scores, steps=k) for k, scores in found.items()]
    return {
        metric: headline.mean,
        "interval": headline.interval,
        "tasks": len(found[steps]),
        "protocol": facts,
        "name": name,
        "steps": steps,
        "metric": metric,
        "rows": rows,
        "differences": list(differences),
    }


def protocol(config: TrainConfig, data: Data, learner: MetaLearner) -> dict:
    """What an accuracy is an accuracy of."""
    return {
        "data": data.name,
        "question": config.question or config.split,
        "ways": None if config.source == "sinusoid" else config.ways,
        "shots": config.shots,
        "query_shots": config.query_shots,
        "model": config.model,
        "batch_statistics": "transductive" if _is_transductive(learner) else "inductive",
    }


def baselines(config: TrainConfig, data: Data, say):
    """(label, scores, facts) of each baseline on the test tasks, step size and count tuned on training classes."""
    if config.source == "sinusoid":
        return
    counts = {"tasks": config.test_tasks, "tuning_tasks": min(config.test_tasks, 50)}
    say("baseline: the same network from a random start")
    tuned = fine_tune(lambda n: build_model(config, 1000 + n), data.tuning, data.test, **counts)
    yield "random start, support set only", tuned.scores, _facts(tuned)
    learned = {"pretrained classifier, fine-tuned": data.own_classes}
    if config.augment != "none":
        learned["pretrained on augmented, fine-tuned"] = data.classes
    for label, classes in learned.items():
        say(f"baseline: the same network pretrained as a classifier of {len(classes)} classes")
        model = pretrained(config, classes)
        tuned = fine_tune(model, data.tuning, data.test, **counts)
        yield label, tuned.scores, _facts(tuned)
    yield "nearest centroid of the pixels", nearest_centroid(data.test, tasks=config.test_tasks), {}


def pretrained(config: TrainConfig, classes: ClassSource) -> nn.Module:
    """The run's network as an ordinary classifier of these classes has learned it, with a head of zeros: the
    classifier's own head means nothing under new labels.
    """
    model = build_model(config)
    owner, _, last = head_name(model).rpartition(".")
    owner = model.get_submodule(owner)
    head = getattr(owner, last)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        setattr(owner, last, nn.Linear(head.in_features, len(classes)).to(head.weight))
    pretrain(model, classes, seed=config.seed)
    setattr(owner, last, head)
    return model


def circumstances() -> dict:
    """When, where and with what a result was measured."""
    root = Path(__file__).resolve().parents[2]
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


def load_run(run: Path, **changes) -> tuple[TrainConfig, MetaLearner]:
    """The settings, with changes, and the trained learner of a run directory.

    Raises:
        InputError: the directory holds no finished run, or a damaged one.
    """
    config = load_config(run)
    config = TrainConfig(**{**vars(config), **{k: v for k, v in changes.items() if v is not None}})
    learner = build_learner(config, build_model(config))
    return config, load_weights(run / "weights.safetensors", learner)


def evaluate_run(
    config: TrainConfig, learner: MetaLearner, statistics: str = "own", seed: int | None = None
) -> dict:
    """Evaluate a loaded run on unseen tasks; statistics as in `EvaluateConfig`.

    With "both" the result is that of the model's own statistics, the other one stands under "inductive", and
    "warning" says so where the paired difference is larger than its interval.
    """
    data = open_data(config, test_seed=seed)

    def run(inductive: bool) -> dict[int, Tensor]:
        return evaluate(
            learner, data.test, tasks=config.test_tasks, at_steps=config.test_steps, inductive=inductive
        )

    found = run(statistics == "inductive")
    result = summary(config, learner, data, found, inductive=statistics == "inductive")
    if statistics == "both":
        other = run(True)
        paired = estimate(found[result["steps"]] - other[result["steps"]])
        result["inductive"] = summary(config, learner, data, other, inductive=True)
        result["difference"] = paired._asdict()
        if abs(paired.mean) > paired.interval:
            result["warning"] = (
                "query examples inform each other: with statistics of the support set alone the accuracy is "
                f"{100 * paired.mean:.1f} ± {100 * paired.interval:.1f} points lower"
            )
    return result


def describe(result: dict) -> str:
    """The result as text: what was measured, the table, the verdict."""
    protocol = result["protocol"]
    ways = f"{protocol['ways']}-way " if protocol["ways"] else ""
    heading = f"{ways}{protocol['shots']}-shot"
    lines = [
        f"{', '.join(filter(None, (protocol['data'], protocol['question'])))}, {heading}, "
        f"{result['tasks']} unseen tasks, "
        f"{protocol['batch_statistics']}",
        "",
        table([(heading, result)]),
    ]
    if result["differences"]:
        lines += ["", verdict(result)]
    if "inductive" in result:
        lines += ["", describe(result["inductive"])]
    if "warning" in result:
        lines.append(f"warning: {result['warning']}")
    return "\n".join(lines).rstrip() + "\n"


def _row(label: str, scores, **facts) -> dict:
    found = estimate(scores)
    return {"label": label, "mean": found.mean, "interval": found.interval, **facts}


def _facts(tuned) -> dict:
    return {"inner_lr": tuned.inner_lr, "steps": tuned.steps}


def _steps(steps: int) -> str:
    return {0: "before adaptation", 1: "after 1 step"}.get(steps, f"after {steps} steps")


def _is_transductive(learner: MetaLearner) -> bool:
    """Whether a layer normalises the query set by statistics of its own, so that its examples inform each other."""

    def mixes(layer: nn.Module) -> bool:
        if isinstance(layer, BatchNorm):
            return layer.statistics == "batch"
        native = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        return native and (layer.training or not layer.track_running_stats)

    return any(map(mixes, learner.model.modules()))
