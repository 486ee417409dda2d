"""The command line, `fomaml train | evaluate | compare | tune | …`. It prints; all else returns or raises."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from fomaml.app.checking import check_module
from fomaml.app.checks import check_below, check_seed, check_steps
from fomaml.app.commands import (
    CheckOptions,
    CompareOptions,
    EvaluateOptions,
    PresetsOptions,
    TrainOptions,
    given,
    headings,
)
from fomaml.app.compare import compare, expand
from fomaml.app.compare import describe as describe_comparison
from fomaml.app.compare_page import is_comparison, report_comparison
from fomaml.app.compare_resume import begun, begun_before
from fomaml.app.demo_server import run_demo
from fomaml.app.failures import told_in_one_line
from fomaml.app.interrupts import listening, status_of
from fomaml.app.inventory import README
from fomaml.app.judge import describe, evaluate_run
from fomaml.app.launch import launched
from fomaml.app.named import resume_line, with_weights
from fomaml.app.parser import parse_command
from fomaml.app.presets import PRESETS
from fomaml.app.progress import watching
from fomaml.app.report import align
from fomaml.app.report_options import ReportOptions, ShowRunOptions
from fomaml.app.report_page import report
from fomaml.app.resume import resumed_settings
from fomaml.app.rundir import load_run, load_settings
from fomaml.app.search import asked as asked_search
from fomaml.app.search import resumed
from fomaml.app.serve_commands import (
    evaluate_adapted,
    is_adapted,
    run_adapt,
    run_calibrate,
    run_export,
    run_predict,
)
from fomaml.app.serve_options import (
    AdaptOptions,
    CalibrateOptions,
    DemoOptions,
    ExportOptions,
    PredictOptions,
)
from fomaml.app.session import train_run
from fomaml.app.settings import BaselineSize, Part, Settings, TestAugmentation, Weights
from fomaml.app.settle import settle_with_origins
from fomaml.app.show import describe as describe_data
from fomaml.app.show import show
from fomaml.app.show_options import ShowOptions
from fomaml.app.show_run import draw_run, show_run
from fomaml.app.sources import split_name
from fomaml.app.tune import describe as describe_search
from fomaml.app.tune import tune
from fomaml.app.tune_options import TuneOptions
from fomaml.app.wording import option as typed
from fomaml.choices import Statistics, check_choice
from fomaml.errors import InputError, positive
from fomaml.learning.learner import MetaLearner
from fomaml.sealed import finite


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with status 2 and one line on standard error where the input is bad or the machine refuses
    something, 130 after Ctrl-C, 143 after SIGTERM, 141 where standard output was closed: see `failures`.
    """
    try:
        with listening(), launched().speaking(), told_in_one_line(), log_shown():
            kinds = {name: command.options for name, command in COMMANDS.items()}
            options = parse_command(kinds, arguments, "fomaml", "First-order MAML and its relatives.")
            [name] = [name for name, command in COMMANDS.items() if command.options is type(options)]
            launched().check_command(name)
            COMMANDS[name].run(options)
    except KeyboardInterrupt as stopped:
        if launched().first:
            print("fomaml: interrupted", file=sys.stderr)
        raise SystemExit(status_of(stopped)) from None


@contextlib.contextmanager
def resumable(line: str) -> Iterator[None]:
    """Within work that can go on after Ctrl-C or SIGTERM: the last line says by which command."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        print(f"fomaml: interrupted\nresume with: {line}", file=sys.stderr)
        raise SystemExit(status_of(stopped)) from None


@contextlib.contextmanager
def log_shown() -> Iterator[None]:
    """Within a command: what the library logs, downloads say, is shown on standard error."""
    handler, logger = logging.StreamHandler(), logging.getLogger("fomaml")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _train(options: TrainOptions) -> None:
    asked, launch = given(options), launched()
    if options.resume is not None:
        out = asked.pop("resume")
        with launch.checking():
            settings = resumed_settings(out, asked)
    else:
        dry_run = asked.pop("dry_run", False)
        if asked.pop("accept_changed_code", False):
            raise InputError("--accept-changed-code goes with --resume")
        with launch.checking():
            settings, origins = settle_with_origins(asked)
        if dry_run:
            print(settled(settings, origins))
            return
        out = Path(launch.decided(lambda: str(settings.out or default_out(settings))))
    with resumable(resume_line(settings, out)), watching(settings, sys.stdout) as watch:
        result = train_run(
            settings, out, say=watch.say, watch=watch, work=watch.work, validated=watch.validated,
            resume=options.resume is not None,
        )  # fmt: skip
    print("\n" + describe(result) + f"\nrun directory: {out} (see {README} there)")


def settled(settings: Settings, origins: dict[str, str]) -> str:
    """The settings of a run under the headings of the options, each with where it came from."""
    lines = [["setting", "value", "from"]]
    for heading, names in headings(TrainOptions).items():
        if heading:
            lines.append([f"\n{heading}", "", ""])
        for name in names:
            if name in origins:
                value = getattr(settings, name)
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                lines.append([name, "-" if value is None else shown, origins[name]])
    told = "The data decide on validate_every, where it is not given, when the run begins."
    return f"{align(lines, left=True)}\n\n{told}"


def _evaluate(options: EvaluateOptions) -> None:
    if is_adapted(options.run):
        _evaluate_adapted(options)
        return
    if options.moved_run is not None:
        raise InputError(f"--run is of an adapted model, and {options.run} is a run: give no --run")
    if options.query is not None:
        raise InputError(
            f"--query judges an adapted model, and {options.run} is a run: fomaml adapt makes one of it"
        )
    for name in ("tasks", "ways", "shots", "query_shots", "copies"):
        if getattr(options, name) is not None:
            positive(typed(name), getattr(options, name), integer=True)
    if options.seed is not None:
        check_seed(options.seed)
    if options.steps is not None:
        check_steps("--steps", options.steps)
    for statistics in options.statistics or ():
        check_choice("statistics", statistics, Statistics)
    check_choice("part", options.part, Part)
    check_choice("weights", options.weights, Weights)
    if options.test_augment is not None:
        check_choice("test augment", options.test_augment, TestAugmentation)
    if options.baseline_size is not None:
        check_choice("baseline size", options.baseline_size, BaselineSize)
    if options.jitter is not None:
        check_below("--jitter", options.jitter, 1)
    with launched().checking():
        settings, learner = _loaded(options)
    result = evaluate_run(
        settings, learner, options.statistics, options.seed, options.part, options.balanced, options.baselines,
        say=lambda line: print(line, file=sys.stderr, flush=True), launch=launched(),
    )  # fmt: skip
    print(json.dumps(finite(result), indent=2) if options.json else describe(result).rstrip())


def _loaded(options: EvaluateOptions) -> tuple[Settings, MetaLearner]:
    """What is evaluated: the settings, and the learner."""
    launch, device = launched(), options.device
    if launch.many:
        device = launch.device(device or load_settings(options.run).device)
    settings, learner = load_run(
        options.run,
        options.weights,
        model=options.model,
        loss=options.loss,
        features_of=options.features_of,
        features_weights=options.features_weights,
        metric=options.metric,
        metric_direction=options.metric_direction,
        accept_changed_code=options.accept_changed_code,
        data_root=options.data_root,
        device=device,
        test_tasks=options.tasks,
        test_steps=options.steps,
        ways=options.ways,
        shots=options.shots,
        test_query_shots=options.query_shots,
        test_augment=options.test_augment,
        test_copies=options.copies,
        test_jitter=options.jitter,
        baseline_size=options.baseline_size,
    )
    if options.jitter is not None and settings.test_copies == 1:
        raise InputError("--jitter moves the copies of each image: give --copies, 2 or more")
    if options.baselines:
        settings = with_weights(settings, options.run, options.model_weights)
    for name in ("baseline_size", "model_weights"):
        if getattr(options, name) is not None and not options.baselines:
            raise InputError(f"{typed(name)} is of baselines: give --baselines beside it")
    return settings, learner


def _evaluate_adapted(options: EvaluateOptions) -> None:
    asked = given(options)
    names = {
        "model": "model",
        "moved_run": "run",
        "device": "device",
        "accept_changed_code": "accept_changed_code",
    }
    kept = {names[name]: asked.pop(name) for name in names if name in asked}
    path, query, as_json = asked.pop("run"), asked.pop("query", None), asked.pop("json", False)
    if asked:
        raise InputError(f"{path} holds an adapted model, which takes no {typed(next(iter(asked)))}")
    evaluate_adapted(path, query, as_json, **kept)


def _presets(options: PresetsOptions) -> None:
    if options.json:
        print(json.dumps({name: preset._asdict() for name, preset in PRESETS.items()}, indent=2))
        return
    lines = [["preset", "aims at, %", "statistics", "source", "what it is"]]
    lines += [[name, p.aim, p.statistics, p.source, p.summary] for name, p in PRESETS.items()]
    print(align(lines, left=True))
    print("\nfomaml train --preset NAME --data-root FOLDER; add --dry-run to see every setting")


def _compare(options: CompareOptions) -> None:
    launch, resume = launched(), options.resume
    with launch.checking():
        options = options if resume is None else begun(options)
        first = expand(options)[0]
    out = resume or Path(launch.decided(lambda: str(options.out or default_out(first, "compare"))))
    before = launch.decided(lambda: begun_before(options, out)) if launch.restarts and resume is None else ""
    if before == "finished":
        print((out / "compare.txt").read_text(encoding="utf-8") if launch.first else "")
        return
    going_on = resume is not None or before == "begun"
    with resumable(f"fomaml compare --resume {shlex.quote(str(out))}"):
        result = compare(options, out, say=lambda line: print(line, flush=True), resume=going_on)
    print("\n" + describe_comparison(result) + f"\nsaved in {out}")


def _tune(options: TuneOptions) -> None:
    going_on = options.resume is not None
    search = resumed(options) if going_on else asked_search(options)
    out = options.resume or search.settings.out or default_out(search.settings, "tune")
    with resumable(f"fomaml tune --resume {shlex.quote(str(out))}"):
        best = tune(search, out, say=lambda line: print(line, flush=True), resume=going_on)
    print(f"\n{describe_search(best)}\nsaved in {out}")


def _report(options: ReportOptions) -> None:
    if is_comparison(options.run):
        print(f"saved {report_comparison(options)}")
        return
    print(f"saved {report(options, say=lambda line: print(line, file=sys.stderr, flush=True))}")


def _show(options: ShowRunOptions) -> None:
    if options.png is None:
        print(show_run(options.run))
        return
    for path in draw_run(options.run, options.png):
        print(f"saved {path}")


def _data(options: ShowOptions) -> None:
    facts = show(options)
    print(json.dumps(facts, indent=2) if options.json else describe_data(facts).rstrip())


def _check(options: CheckOptions) -> None:
    report = check_module(options)
    print(json.dumps(report.facts(), indent=2) if options.json else report.text())
    if report.exit_status:
        raise SystemExit(report.exit_status)


def default_out(settings: Settings, what: str | None = None) -> Path:
    """A new folder under out/, named by what the run is and when it began."""
    parts = [
        split_name(settings.source)[0],
        settings.question,
        f"{settings.shots}shot",
        what or settings.algorithm,
    ]
    kind = "-".join(part for part in parts if part)
    return Path("out") / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"


class Command(NamedTuple):
    """options: the dataclass of what may be given. run: does it."""

    options: type
    run: Callable[[Any], None]


COMMANDS = {
    "train": Command(TrainOptions, _train),
    "evaluate": Command(EvaluateOptions, _evaluate),
    "adapt": Command(AdaptOptions, run_adapt),
    "predict": Command(PredictOptions, run_predict),
    "demo": Command(DemoOptions, run_demo),
    "export": Command(ExportOptions, run_export),
    "calibrate": Command(CalibrateOptions, run_calibrate),
    "show": Command(ShowRunOptions, _show),
    "report": Command(ReportOptions, _report),
    "compare": Command(CompareOptions, _compare),
    "tune": Command(TuneOptions, _tune),
    "data": Command(ShowOptions, _data),
    "check": Command(CheckOptions, _check),
    "presets": Command(PresetsOptions, _presets),
}
