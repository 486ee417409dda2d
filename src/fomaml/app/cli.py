"""The command line: `fomaml train | evaluate | presets | compare | check`. It prints; all else returns or raises."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fomaml.app.commands import CheckConfig, CompareConfig, EvaluateConfig, PresetsConfig, expand
from fomaml.app.presets import PRESETS
from fomaml.app.report import align, duration
from fomaml.app.resolve import check_below, resolve
from fomaml.app.settings import (
    PARTS,
    STATISTICS,
    TEST_AUGMENTATIONS,
    WEIGHTS,
    TrainConfig,
    check_steps,
    known,
)
from fomaml.errors import InputError, positive

Command = (
    Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
    | Annotated[PresetsConfig, tyro.conf.subcommand("presets")]
    | Annotated[CompareConfig, tyro.conf.subcommand("compare")]
    | Annotated[CheckConfig, tyro.conf.subcommand("check")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exits with status 2 and one line on standard error where the input is bad."""
    command = tyro.cli(
        Command, prog="fomaml", description="First-order MAML and its relatives.", args=arguments
    )
    commands = {
        TrainConfig: _train,
        EvaluateConfig: _evaluate,
        PresetsConfig: _presets,
        CompareConfig: _compare,
        CheckConfig: _check,
    }
    try:
        with told_in_one_line():
            commands[type(command)](command)
    except KeyboardInterrupt:
        print("fomaml: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Within a command: bad input is one line on standard error, and the exit status 2."""
    try:
        yield
    except InputError as error:
        print(f"fomaml: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _train(config: TrainConfig) -> None:
    from fomaml.app.judge import describe
    from fomaml.app.session import load_config, train_run

    out, resume = config.resume, config.resume is not None
    if resume:
        if config != TrainConfig(resume=config.resume):
            raise InputError("--resume takes the settings of the run; no other option goes with it")
        config = load_config(out)
    else:
        config = resolve(config)
        out = config.out or default_out(config)
    with watching(config, sys.stdout) as watch:
        result = train_run(config, out, say=watch.say, watch=watch, resume=resume)
    print("\n" + describe(result) + f"\nrun directory: {out}")


def _evaluate(config: EvaluateConfig) -> None:
    if config.tasks is not None:
        positive("tasks", config.tasks, integer=True)
    if config.steps is not None:
        check_steps(config.steps)
    if config.statistics is not None:
        for each in config.statistics:
            known("statistics", each, STATISTICS)
    known("part", config.part, PARTS)
    known("weights", config.weights, WEIGHTS)
    for name in ("ways", "shots", "query_shots", "copies"):
        if getattr(config, name) is not None:
            positive(name, getattr(config, name), integer=True)
    if config.test_augment is not None:
        known("test augment", config.test_augment, TEST_AUGMENTATIONS)
    if config.jitter is not None:
        check_below("jitter", config.jitter, 1)
    from fomaml.app.judge import describe, evaluate_run
    from fomaml.app.session import load_run

    run, learner = load_run(
        config.run,
        config.weights,
        data_root=config.data_root,
        device=config.device,
        test_tasks=config.tasks,
        test_steps=config.steps,
        ways=config.ways,
        shots=config.shots,
        test_query_shots=config.query_shots,
        test_augment=config.test_augment,
        test_copies=config.copies,
        test_jitter=config.jitter,
    )
    if config.jitter is not None and run.test_copies == 1:
        raise InputError("--jitter moves the copies of each image: give --copies, 2 or more")
    result = evaluate_run(run, learner, config.statistics, config.seed, config.part, config.balanced)
    print(json.dumps(result, indent=2) if config.json else describe(result).rstrip())


def _presets(config: PresetsConfig) -> None:
    if config.json:
        print(json.dumps({name: preset._asdict() for name, preset in PRESETS.items()}, indent=2))
        return
    lines = [["preset", "aims at, %", "batch norm", "source", "what it is"]]
    lines += [[name, p.aim, p.statistics, p.source, p.summary] for name, p in PRESETS.items()]
    print(align(lines, left=True))
    print("\nfomaml train --preset NAME --data-root FOLDER; --json tells every setting")


def _compare(config: CompareConfig) -> None:
    first = expand(config)[0]
    from fomaml.app.compare import compare, describe

    out = config.out or default_out(first, "compare")
    result = compare(config, out, say=lambda line: print(line, flush=True))
    print("\n" + describe(result) + f"\nsaved in {out}")


def _check(config: CheckConfig) -> None:
    known("input dtype", config.input_dtype, ("float32", "int64"))
    if (config.input_dtype == "int64") != (config.vocabulary is not None):
        raise InputError("--input-dtype int64 and --vocabulary N go together: the numbers are drawn below N")
    from fomaml.app.modules import load_module
    from fomaml.check import check

    with contextlib.redirect_stdout(sys.stderr):  # what the module itself prints
        report = check(
            load_module(config.module, config.seed),
            config.input,
            vocabulary=config.vocabulary,
            ways=config.ways,
            shots=config.shots,
            query_shots=config.query_shots,
            inner_steps=config.inner_steps,
            inner_lr=config.inner_lr,
            seed=config.seed,
            name=config.module,
        )
    print(json.dumps(report.facts(), indent=2) if config.json else report.text())
    if report.exit_status:
        raise SystemExit(report.exit_status)


def default_out(config: TrainConfig, what: str | None = None) -> Path:
    """A new folder under out/, named by what the run is and when it began."""
    parts = [
        config.source.partition(":")[0],
        config.question,
        f"{config.shots}shot",
        what or config.algorithm,
    ]
    kind = "-".join(filter(None, parts))
    return Path("out") / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"


@contextlib.contextmanager
def watching(config: TrainConfig, stream) -> Iterator[Watch]:
    """Shows a run's progress: a live bar on a terminal, a plain line at every tenth elsewhere."""
    console = Console(file=stream)
    if not console.is_terminal:
        yield Watch(config, lambda line: print(line, file=stream, flush=True))
        return
    columns = (
        TextColumn("meta-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=config.iterations, figures="")
        yield Watch(config, bar.console.print, bar, task)


class Watch:
    """Receives the measured records of a run; `say` prints a line."""

    def __init__(self, config: TrainConfig, say, bar=None, task=None):
        self.config, self.say, self.bar, self.task = config, say, bar, task
        self.printed = 0

    def __call__(self, record, seconds: float) -> None:
        figures = self.figures(record, seconds)
        if self.bar is not None:
            self.bar.update(self.task, completed=record.iteration, figures=figures)
            return
        tenth = 10 * record.iteration // self.config.iterations
        if tenth > self.printed:
            self.printed = tenth
            left = seconds * (self.config.iterations / record.iteration - 1)
            self.say(
                f"iteration {record.iteration}/{self.config.iterations}  {figures}  {duration(left)} left"
            )

    def figures(self, record, seconds: float) -> str:
        before, after = record.before.item(), record.after.item()
        if self.config.source == "sinusoid":
            moved = f"query error {before:.2f} → {after:.2f}"
        else:
            moved = f"query accuracy {100 * before:.0f} → {100 * after:.0f} %"
        speed = record.iteration * self.config.meta_batch_size / seconds
        return f"meta-loss {record.meta_loss.item():.3f}  {moved}  {speed:.0f} tasks/s"
