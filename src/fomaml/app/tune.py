"""`fomaml tune`: a search over the settings that matter most, for the learner and for each baseline, by validation.

Its folder holds tune.json, what is searched; trials.jsonl, a line for each trial that has ended, which a search that
was killed goes on from; and, at the end, best.json and result.txt.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fomaml import regular, tuning
from fomaml.app import rundir
from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.build import (
    COMPILE,
    Data,
    build_learner,
    build_optimizer,
    build_schedule,
    for_test,
    open_data,
    with_data,
    with_precision,
)
from fomaml.app.check_settings import check_settings
from fomaml.app.group_tasks import of_units
from fomaml.app.methods import Method, methods
from fomaml.app.networks import build_model, check_model
from fomaml.app.report import align
from fomaml.app.scores import facts_of, headline
from fomaml.app.search import FORMAT, SEARCH, Search, as_json
from fomaml.app.settings import Settings
from fomaml.app.trial import try_own
from fomaml.app.wording import option as typed
from fomaml.errors import InputError
from fomaml.evaluate import evaluate
from fomaml.files import write_json, write_text
from fomaml.metrics import Metric
from fomaml.train import check_width, train
from fomaml.tuning import Trial

TRIED, BEST, TEXT = "trials.jsonl", "best.json", "result.txt"
Say = Callable[[str], None]


def tune(search: Search, out: Path, *, say: Say, resume: bool = False) -> dict[str, Any]:
    """Search, write the folder and return what best.json holds.

    Raises:
        InputError: bad data or settings, before anything is written; the folder holds something else; all trials fail.
    """
    data = open_data(search.settings)
    settings = with_precision(with_data(search.settings, data))
    search = search._replace(settings=settings)
    learner = build_learner(settings, build_model(settings))
    check_model(settings, learner.model, data.train)
    check_width(learner, data.train)
    try_own(settings, learner, data.train)
    if not resume and (out / SEARCH).exists():
        raise InputError(f"{out} already holds a search; give another --out, or --resume {out}")
    with (rundir.alone if resume else rundir.claimed)(out):
        write_text(out / SEARCH, as_json(search))
        return _Tuning(search, data, out, say).run()


class _Tuning:
    """A search that holds its folder."""

    def __init__(self, search: Search, data: Data, out: Path, say: Say):
        self.search, self.data, self.out, self.say = search, data, out, say
        self.metric: Metric = headline(search.settings)
        self.episodes: Any = data.validation or data.tuning
        self.record = _Record(out / TRIED)

    def run(self) -> dict[str, Any]:
        settings, data, search = self.search.settings, self.data, self.search
        self.say(f"{data.name}: {data.origin}")
        on = f"{settings.validation_tasks} validation tasks"
        if data.validation is None:
            on = f"{settings.validation_tasks} tasks like those of training, other ones: {data.unvalidated}"
        self.say(
            f"{search.trials} trials of {search.iterations} iterations each, by {self.metric.name} on {on}"
        )
        title = ALGORITHMS[settings.algorithm].title
        found = {}
        for method in (
            Method(title, search.spaces(), self._learner),
            *methods(settings, data, self.episodes, self.say),
        ):
            found[method.label] = self._best(method)
        best = self._told(found, title)
        write_json(self.out / BEST, best)
        write_text(self.out / TEXT, describe(best))
        return best

    def _best(self, method: Method) -> Trial:
        known = self.record.of(method.label)

        def note(trial: Trial) -> None:
            self.record.add(method.label, trial, self._more)
            self.say(
                f"{method.label}, trial {trial.number + 1} of {self.search.trials}: {_line(trial, self.metric)}"
            )

        self._more: dict[str, Any] = {}
        best = tuning.search(
            method.space,
            self.search.trials,
            method.score,
            direction=self.metric.direction,
            seed=self.search.seed,
            finished=known,
            note=note,
        ).best
        return (
            best if method.score_of_all is None else best._replace(score=method.score_of_all(best.settings))
        )

    def _learner(self, changed: dict[str, Any]) -> float:
        """The validation score of a learner that is trained with these settings, after the best number of steps."""
        settings = changed_settings(self.search, changed)
        found = evaluate(
            for_test(settings, trained(settings, self.data)),
            self.episodes,
            tasks=settings.validation_tasks,
            at_steps=settings.test_steps,
            statistics=settings.statistics,
            metric=self.metric,
        )
        means = {
            steps: of_units(self.episodes, scores).mean().item() for steps, scores in found.items() if steps
        } or {0: of_units(self.episodes, found[0]).mean().item()}
        steps = max(means, key=lambda steps: (_worth(means[steps], self.metric), -steps))
        self._more = {"at_steps": steps}
        return means[steps]

    def _told(self, found: Mapping[str, Trial], title: str) -> dict[str, Any]:
        """What best.json holds."""
        best = found[title]
        at = self.record.more(title, best.number).get("at_steps", self.search.settings.test_steps[-1])
        steps = [k for k in self.search.settings.test_steps if k <= at]
        words = [*self.search.words]
        if "--test-steps" in words:
            first = words.index("--test-steps")
            last = next((n for n in range(first + 1, len(words)) if words[n].startswith("--")), len(words))
            del words[first:last]
        for name, value in best.settings.items():
            words += [typed(name), str(value)]
        words += ["--test-steps", *map(str, steps)]
        return {
            "format": FORMAT,
            **facts_of(self.metric),
            "validation_tasks": self.search.settings.validation_tasks,
            "trials": self.search.trials,
            "iterations": self.search.iterations,
            "methods": {label: {"settings": t.settings, "score": t.score} for label, t in found.items()},
            "name": title,
            "settings": best.settings | {"test_steps": steps},
            "command": f"fomaml train {shlex.join(words)}",
        }


def changed_settings(search: Search, changed: Mapping[str, Any]) -> Settings:
    """The settings of a trial."""
    settings = search.settings
    more: dict[str, Any] = {}
    if settings.multi_step_iterations is not None:  # as large a part of the training
        share = settings.multi_step_iterations / settings.iterations
        more["multi_step_iterations"] = max(1, round(share * search.iterations))
    found = dataclasses.replace(settings, **{**changed, **more}, iterations=search.iterations)
    check_settings(found)
    return found


def trained(settings: Settings, data: Data) -> Any:
    """A learner that is meta-trained, without a run directory."""
    learner = build_learner(settings, build_model(settings))
    steps = train(
        learner,
        data.train,
        build_optimizer(settings, learner),
        iterations=settings.iterations,
        meta_batch_size=settings.meta_batch_size,
        schedule=build_schedule(settings),
        measure_every=settings.iterations,
        clip=settings.clip,
        engine=settings.engine,
        tasks_at_once=settings.tasks_at_once,
        compile=COMPILE[settings.compile],
        autocast=None if settings.autocast == "none" else getattr(torch, settings.autocast),
    )
    for _ in steps:
        pass
    return learner


class _Record:
    """The trials that have ended, a line each."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, Any]] = list(_lines(path))
        write_text(path, "".join(map(rundir.written_line, self.lines)))  # without half a line

    def of(self, method: str) -> list[Trial]:
        fields = Trial._fields
        return [
            tuning.from_json({name: line[name] for name in fields})
            for line in self.lines
            if line["method"] == method
        ]

    def more(self, method: str, number: int) -> dict[str, Any]:
        """What was told of a trial beside."""
        return next(line for line in self.lines if (line["method"], line["number"]) == (method, number))

    def add(self, method: str, trial: Trial, more: Mapping[str, Any]) -> None:
        line = {"method": method, **tuning.to_json(trial), **more}
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(rundir.written_line(line))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    text = regular.read_text(path, regular.LOG) if path.exists() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = rundir.checked_line(line)
            yield {"method": found["method"], **found}
            [found[name] for name in Trial._fields]
        except (ValueError, KeyError, TypeError):
            if number < len(text.splitlines()):
                raise InputError(f"line {number} of {path} is no trial: mend it or leave it out") from None


def _worth(mean: float, metric: Metric) -> float:
    return metric.direction * mean if mean == mean else -float("inf")


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {_value(value)}" for name, value in settings.items())


def _value(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _line(trial: Trial, metric: Metric) -> str:
    if trial.score is None:
        return f"{_settings(trial.settings)}: failed, {trial.reason}"
    return f"{_settings(trial.settings)}: {_score(trial.score, metric)}"


def _score(score: float, metric: Metric) -> str:
    digits = 3 if metric.unit == "" else 1
    value = metric.scale * score
    return f"{value:.4g}" if abs(value) > 1e6 else f"{value:.{digits}f} {metric.unit}".rstrip()


def describe(best: Mapping[str, Any]) -> str:
    """best.json as a table, and the line that trains with the best settings."""
    metric = Metric(best["metric"], lambda *_: torch.empty(0), best["direction"], best["unit"])
    lines = [["method", f"validation {metric.name}", f"the best of {best['trials']} trials"]]
    for label, found in best["methods"].items():
        lines.append(
            [label, _score(found["score"], metric), _settings(found["settings"]) or "nothing to tune"]
        )
    return f"{align(lines, left=True)}\n\n{best['command']}\n"
