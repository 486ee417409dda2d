"""The one training loop around `train`: of `fomaml train`, of each algorithm of `fomaml compare`, of `make train`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomaml.app import planned, rundir
from fomaml.app.agenda import Agenda, Clock, Noted, Progress
from fomaml.app.announced import announced
from fomaml.app.build import (
    build_learner,
    build_optimizer,
    build_plan,
    build_schedule,
    open_data,
    with_data,
    with_precision,
)
from fomaml.app.calibrate import calibrated_result
from fomaml.app.data_identity import with_identity
from fomaml.app.fits import check_training_fits
from fomaml.app.interrupts import Interrupts
from fomaml.app.judge import Scores, beside_baselines, describe, judge
from fomaml.app.launch import Launch, launched
from fomaml.app.logs import opened
from fomaml.app.named import resume_line
from fomaml.app.networks import build_model, check_model
from fomaml.app.rivals import estimators
from fomaml.app.rundir import circumstances
from fomaml.app.scores import headline
from fomaml.app.settings import Settings
from fomaml.app.sources import source_of
from fomaml.app.together import Together, begun
from fomaml.app.trial import try_own, try_targets
from fomaml.app.validate import Best, is_due, validate, with_validation
from fomaml.checkpoint import save_weights
from fomaml.errors import InputError
from fomaml.files import write_json, write_text
from fomaml.finite import NotFiniteError
from fomaml.train import Record, check_width, measured_by_default, train

NO_LIMIT = 2**62
PARTS = ("train", "validation", "test")
Say = Callable[[str], None]
Watch = Callable[[Record, float], None]
Validated = Callable[[str], None]


def train_run(
    settings: Settings,
    out: Path,
    *,
    say: Say = print,
    watch: Watch = lambda record, seconds: None,
    work: Progress = lambda what, done, total, left: None,
    validated: Validated = lambda score: None,
    resume: bool = False,
) -> dict:
    """Train, evaluate and write the run directory `out`; returns the result, as in result.json.

    say: receives a line on the data, the engine and each validation. watch: receives each measured record and the
    seconds of training so far. work: see `Progress`. validated: receives the score of each validation in words.
    resume: `out` holds a run of these settings that was killed; it goes on from its last checkpoint, and ends bit for
    bit as it would have, unless it is limited by seconds. One that was killed among its baselines is resumed too.

    SIGINT and SIGTERM finish the outer step at hand and save it; then `Stopped`, a KeyboardInterrupt, is raised.

    Raises:
        InputError: bad data, device or settings, before anything is written; `out` holds a run, or, to
            resume, a finished one.
    """
    with session(settings, out, say=say, watch=watch, work=work, validated=validated, resume=resume) as run:
        if not run.was_finished:
            run.train()
        return rundir.read_result(out) if run.was_finished else run.finish()


def session(
    settings: Settings,
    out: Path,
    *,
    say: Say,
    watch: Watch = lambda record, seconds: None,
    work: Progress = lambda what, done, total, left: None,
    validated: Validated = lambda score: None,
    resume: bool = False,
    allow_download: bool = True,
    launch: Launch | None = None,
) -> contextlib.AbstractContextManager[Session]:
    """A run that holds its directory while the block lasts; as `train_run`. launch: how this process was started."""
    given = out, say, watch, work, validated, allow_download
    return begun(launch or launched(), settings, out, resume, lambda own, all: Session(own, *given, all))


class Session:
    """One run: what its settings stand for, and how far it has come.

    settings: complete, with what only the data and the device could tell. scores: once finished, the (tasks,) scores of
    the test by number of inner steps.
    """

    def __init__(
        self,
        settings: Settings,
        out: Path,
        say: Say,
        watch: Watch,
        work: Progress,
        validated: Validated,
        allow_download: bool = True,
        together: Together | None = None,
    ):
        check_training_fits(settings)
        self.together = together or Together(Launch({}), settings)
        self.first, self.was_finished = self.together.first, False  # was: before torchrun started it again
        self.data = open_data(settings, allow_download=allow_download)
        settings = with_identity(settings, self.data)
        self.settings = with_precision(with_validation(with_data(settings, self.data), self.data))
        self.out, self.say, self.watch, self.work, self.tell_score = out, say, watch, work, validated
        self.agenda = Agenda(self.settings, estimators(self.settings, self.data))
        model = build_model(self.settings)
        check_model(self.settings, model, self.data.train)
        self.learner = build_learner(self.settings, model)
        try_own(self.settings, self.learner, self.data.train)
        try_targets(self.settings, {part: getattr(self.data, part) for part in PARTS})
        check_width(self.learner, self.data.test)
        self.optimizer = build_optimizer(self.settings, self.learner)
        self.plan = build_plan(self.settings, self.learner, self.data)
        self.states = self.together.states(out, self.settings, self.learner, self.optimizer, say)
        self.best, self.clock = Best(), Clock()
        self.done = self.validated = self.skipped = self.lines = 0
        self.scores: Mapping[int, Tensor] = {}
        self.interrupts = Interrupts()
        self.tell_logs: Callable[[Mapping[str, Any]], None] = lambda record: None

    def train(
        self, measure_every: int | None = None, after: Callable[[int], None] = lambda iteration: None
    ) -> None:
        """Train from the last checkpoint on, if there is one, to the end.

        At the end the learner has the last weights, and weights.safetensors the best ones, if there is validation.
        measure_every: see `train`. after: is told each iteration, its
        time not counted.
        """
        settings, limit = self.settings, NO_LIMIT if self.settings.seconds else self.settings.iterations
        for line in (*self.together.told(), *announced(settings, self.data, self.plan)):
            self.say(line)
        self._resume()
        after(self.done)
        if self.first:
            (self.out / rundir.METRICS).touch()
        every = measure_every or measured_by_default(settings.iterations)
        no_logs = contextlib.nullcontext(self.tell_logs)
        with opened(settings, self.out, self.done) if self.first else no_logs as self.tell_logs:
            try:
                self._train(limit, every, after)
            except NotFiniteError as error:
                if error.found:
                    raise
                self._go_back()
                self._train(limit, every, after, check_each=True)  # again, up to the same iteration
                raise

    def _go_back(self) -> None:
        """To the last good state, or the beginning."""
        if not self.states.exist():
            torch.manual_seed(self.settings.seed)
            self.learner = build_learner(self.settings, build_model(self.settings))
            self.optimizer = build_optimizer(self.settings, self.learner)
            self.plan = build_plan(self.settings, self.learner, self.data)
            self.states = self.together.states(
                self.out, self.settings, self.learner, self.optimizer, self.say
            )
        self._resume()

    def _train(
        self, limit: int, measure_every: int, after: Callable[[int], None], check_each: bool | None = None
    ) -> None:
        settings = self.settings
        steps: Iterator[Record] | None = None
        self._validate_if_due()  # a run that was stopped before the validation of its last state
        while not self._is_over():
            steps = steps or train(
                self.learner,
                self.data.train,
                self.optimizer,
                iterations=limit,
                meta_batch_size=settings.meta_batch_size,
                start=self.done,
                schedule=build_schedule(settings, self._spent),
                measure_every=measure_every,
                clip=settings.clip,
                plan=self.plan,
                metric=headline(settings),
                on_nonfinite=settings.on_nonfinite,
                check_each=check_each,
                group=self.together.ranks,
            )
            with self.interrupts.finishing():
                with self.clock.counting("training"):
                    record = next(steps, None)
                    if record is not None:
                        numbers = self._numbers(record)  # waits for the device
                if record is None:
                    break
                self.done = record.iteration
                self.skipped += record.skipped
                if record.skipped:
                    self.say(f"iteration {self.done}: skipped, as its numbers are not finite")
                if record.after is not None:
                    self._log(**numbers)
                    self._tell()
                    self.watch(record, self.clock.training)
                due = is_due(settings, self.done)
                often = self.done % settings.checkpoint_every == 0 or self.states.is_time()
                if due or often or self.done == limit or self.interrupts.asked is not None:
                    self.states.check(self.done, record.first_bad)
                    self._save()
            self.interrupts.raise_if_asked()
            self._validate_if_due()
            after(self.done)
        if settings.seconds and settings.validate_every and self.validated < self.done:
            self._validate()

    def _validate_if_due(self) -> None:
        """Validate, and save what came of it; an interruption goes on from the state that is validated."""
        if self.done and self.validated < self.done and is_due(self.settings, self.done):
            self._validate()
            with self.interrupts.finishing():
                self._save()
            self.interrupts.raise_if_asked()

    def finish(self, judged: Callable[[], None] = lambda: None) -> dict:
        """Write the weights, judge them and write the result, which is returned. judged: is called before the last."""
        settings, out, learner = self.settings, self.out, self.learner
        self.states.check(self.done)
        if settings.seconds:
            self._save()  # that its time is over: a run that is killed from here on is trained no further
        self._tell()
        weights: dict = {"kept": "last", "iteration": self.done}
        if settings.validate_every:
            if self.first:
                save_weights(out / rundir.LAST, learner, self.states.identity)
            if not self.best.iteration:
                raise InputError(
                    "no validation gave finite scores, so that no weights are the best: try a smaller meta_lr or "
                    f"inner_lr; the last weights are in {out / rundir.LAST}"
                )
            self.states.load_best()
            best = self.best
            facts = {name: value for name, value in dataclasses.asdict(best).items() if name != "waited"}
            weights = {"kept": "best by validation", **facts, "validation_tasks": settings.validation_tasks}
        elif self.first:
            save_weights(out / rundir.WEIGHTS, learner, self.states.identity)
        test = self._noted("test", "testing", self.data.test, settings.test_tasks)
        data, group = dataclasses.replace(self.data, test=test), self.together.ranks
        result, found = judge(settings, learner, data, self.say, group)
        self.together.part()
        self.scores = found[headline(settings).name]
        self.agenda.finish("test")
        if not self.first:
            return result
        result |= {"iterations": self.done, "weights": weights, "preset": settings.preset}
        spent = dataclasses.asdict(self.clock).items()
        result |= {f"{name}_seconds": round(seconds, 1) for name, seconds in spent}
        told = {"compile": planned.told(self.plan)}
        result |= {"seed": settings.seed, **told, **circumstances(settings.device)}
        some = {"skipped": self.skipped, "changed": list(settings.changed or ()), "code": settings.code}
        result |= {name: value for name, value in some.items() if value}
        if settings.validate_every and source_of(settings).kind == "classification":
            result |= calibrated_result(settings, learner, self.data, out, self.say)
        if settings.baselines:
            result = self._beside_baselines(result, found)
        judged()
        self._write(result)
        for name in (rundir.STATE_BEFORE, rundir.STATE):
            (out / name).unlink(missing_ok=True)
        return result

    def _beside_baselines(self, result: dict, scores: Scores) -> dict:
        """The result with the baselines. That of the learner is shown and on disk before they begin."""
        counters: dict[str, Callable[[float], None]] = {}

        def note(kind: str, cost: float) -> None:
            if kind not in counters:
                for ended in counters:
                    self.agenda.finish(ended)
                total = self.agenda.totals[kind]
                counters[kind] = self.agenda.counter(kind, kind, total, self.work)
            counters[kind](cost)

        line = resume_line(self.settings, self.out)
        unfinished = {"unfinished": f"the baselines follow; after an interruption: {line}"}
        self._write(result | unfinished)
        self.say("\n" + describe(result | unfinished))
        for more in beside_baselines(self.settings, self.data, result, scores, self.say, note):
            result = more
            self._write(result | unfinished)
        return result

    def _write(self, result: dict) -> None:
        text = describe(result)
        write_text(self.out / rundir.RESULT_TEXT, text)
        write_json(self.out / rundir.RESULT, result | rundir.beside(self.out))

    def _noted(self, kind: str, what: str, episodes: Any, tasks: int) -> Any:
        """Episodes whose drawing tells how far their evaluation is."""
        total = self.agenda.totals["test"] if kind == "test" else self.agenda.of_validation
        note = self.agenda.counter(kind, what, total, self.work)
        return Noted(episodes, lambda drawn: note(drawn * total * self.together.launch.size / tasks))

    def _tell(self) -> None:
        """How long the whole run still takes, validations, test and baselines included."""
        self.agenda.trained(self.done, self.clock.training, self.clock.validation)
        self.work("meta-training", self.done, self.settings.iterations, self.agenda.left())

    def _resume(self) -> None:
        self.done, progress = self.states.take_up()
        self.learner.iteration = max(0, self.done - 1)
        self.best, self.clock = Best(**progress.get("best", {})), Clock(**progress.get("clock", {}))
        self.validated, self.skipped = progress.get("validated", 0), progress.get("skipped", 0)
        self.plan = planned.going_on(self.settings, self.learner, self.data, self.plan, progress)
        settings, metrics = self.settings, self.out / rundir.METRICS
        if settings.iterations < self.done and not settings.seconds:
            raise InputError(f"the run in {self.out} has {self.done} iterations: give no fewer --iterations")
        if self.best.iteration and not self.states.has_best(self.best.iteration):
            self.best = Best()
        if self.first and metrics.exists():
            self.lines, damaged = rundir.keep_metrics(metrics, self.done, self.validated)
            if lost := max(damaged, progress.get("lines", self.lines) - self.lines):
                self.say(
                    f"{metrics}: {lost} {'line is' if lost == 1 else 'lines are'} damaged or gone, and left out"
                )
            limit = "" if settings.seconds else f" of {settings.iterations}"
            self.say(f"resuming after iteration {self.done}{limit}")

    def _is_over(self) -> bool:
        settings = self.settings
        if settings.patience is not None and self.best.waited >= settings.patience:
            return True
        return settings.seconds is not None and self._spent() >= settings.seconds

    def _spent(self) -> float:
        return self.together.seconds(self.clock.training)  # the same to all processes

    def _numbers(self, record: Record) -> dict[str, float]:
        """What a record says, in numbers; the loss alone of one that was not measured, where asking costs nothing."""
        if record.after is None and self.settings.seconds is None and record.meta_loss.device.type != "cpu":
            return {}
        loss = record.meta_loss.item()
        if record.before is None or record.after is None:
            return {"meta_loss": loss}
        return {"meta_loss": loss, "before": record.before.item(), "after": record.after.item()}

    def _validate(self) -> None:
        own = self._noted("validation", "validating", self.data.validation, self.settings.validation_tasks)
        data = dataclasses.replace(self.data, validation=own)
        with self.clock.counting("validation"):
            by_steps = validate(self.settings, self.learner, data, self.together.ranks)
        self.validated = self.done
        found = by_steps[self.settings.test_steps[-1]]
        means = {str(steps): own.mean for steps, own in by_steps.items()}
        self._log(validation=found.mean, interval=found.interval, by_steps=means)
        metric = headline(self.settings)
        better = self.best.beaten_by(found, self.done, metric.direction, means)
        if better:
            self.states.save_best()
        text = f"{metric.text(*found, digits=2)} {metric.unit}".rstrip()
        self.tell_score(text)
        best = ", the best so far" if better else ""
        self.say(f"iteration {self.done}: validation {metric.name} {text}{best}")

    def _log(self, **facts) -> None:
        if not self.first:
            return
        record = {"iteration": self.done, **facts, "seconds": self.clock.training}
        with open(self.out / rundir.METRICS, "a", encoding="utf-8") as metrics:
            metrics.write(rundir.written_line(record))
        self.lines += 1
        self.tell_logs(record)

    def _save(self) -> None:
        progress = {
            "best": dataclasses.asdict(self.best),
            "clock": dataclasses.asdict(self.clock),
            "validated": self.validated,
            "skipped": self.skipped,
            "lines": self.lines,  # of metrics.jsonl
            **planned.kept_of(self.settings, self.plan),
        }
        self.states.save(self.done, progress)
