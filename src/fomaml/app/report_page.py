"""`fomaml report`: what a run learned, as one page that holds all it shows, with its plots as files beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fomaml.app import report_plots as plots
from fomaml.app.build import open_data
from fomaml.app.commands import given
from fomaml.app.judge import describe
from fomaml.app.looked_at import Looked, look
from fomaml.app.report import duration, verdict
from fomaml.app.report_examples import of_task, table, text
from fomaml.app.report_options import ReportOptions
from fomaml.app.report_style import page
from fomaml.app.run_record import Record, command, read_record, settings_rows
from fomaml.app.rundir import LAST, WEIGHTS, load_run
from fomaml.app.scores import metric_in
from fomaml.app.settings import Weights
from fomaml.app.sources import source_of
from fomaml.choices import check_choice
from fomaml.errors import InputError, positive, whole
from fomaml.files import write_text

PAGE, FOLDER = "report.html", "report"
TASKS = 200  # that are looked at, at most, where nobody says how many
LISTED = 10  # worst tasks, and confusions
TARGETS = 4  # whose predictions are plotted
# What is given for the data and the weights: where it does not work, the page is not made without it.
INSISTED = {
    "tasks",
    "data_root",
    "model",
    "loss",
    "metric",
    "metric_direction",
    "accept_changed_code",
    "device",
}


@dataclass
class Page:
    """A page in the making. folder: where it and its plots are written."""

    record: Record
    folder: Path
    looked: Looked | None
    missing: str
    weights: Weights

    def figure(self, name: str, draw: Callable[[], Any]) -> str:
        """A plot with its caption; nothing where there is nothing to draw."""
        return figure(self.folder, name, draw)


def figure(folder: Path, name: str, draw: Callable[[], Any]) -> str:
    """A plot with its caption, kept in the folder; nothing where there is nothing to draw."""
    drawn = draw()
    if drawn is None:
        return ""
    svg, told = plots.saved(name, folder, lambda: drawn)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{text(told, 2000)}"', 1)
    links = f'<a href="{name}.png">PNG</a> <a href="{name}.svg">SVG</a>'
    return f"<figure>{svg}<figcaption>{text(told, 2000)} {links}</figcaption></figure>"


def report(options: ReportOptions, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write report.html and its plots; returns the page's path. The run is only read.

    say: is told what is left out, and why.

    Raises:
        InputError: no run, or a damaged one; no matplotlib; tasks that cannot be shown though the options insist on it.
    """
    whole("--shown", options.shown)
    check_choice("weights", options.weights, Weights)
    if options.tasks is not None:
        positive("--tasks", options.tasks, integer=True)
    record = read_record(options.run)
    plots.check_matplotlib()
    looked, missing = None, ""
    try:
        looked = _look(options, record)
    except InputError as error:
        if INSISTED & given(options).keys():
            raise
        missing = f"test tasks are left out: {error}"
        say(missing)
    folder = (options.out or record.path / FOLDER).expanduser()
    made = Page(record, folder, looked, missing, options.weights)
    # the page comes last: where it is, all its plots are
    content = _page(made)
    write_text(folder / PAGE, content)
    return folder / PAGE


def _look(options: ReportOptions, record: Record) -> Looked:
    settings, learner = load_run(
        record.path, options.weights, model=options.model, loss=options.loss, metric=options.metric,
        metric_direction=options.metric_direction, accept_changed_code=options.accept_changed_code,
        data_root=options.data_root, device=options.device,
    )  # fmt: skip
    data = open_data(settings, allow_download=False)
    tasks = options.tasks or min(settings.test_tasks, TASKS)
    return look(settings, learner, data, tasks, options.shown, record.calibrations)


def _page(made: Page) -> str:
    name = text(made.record.path.resolve().name)
    sections = [
        ("bought", "What adaptation buys", _bought(made)),
        ("training", "Meta-training", _training(made)),
        ("tasks", "Test tasks, before and after", _tasks(made)),
        ("wrong", "Where it is wrong", _wrong(made)),
        ("calibration", "What its confidence is worth", _calibration(made)),
        ("time", "Where the time went", _time(made)),
        ("repeat", "Settings, and how to repeat it", _repeat(made)),
    ]
    footer = f"Written by <code>fomaml report</code> from the files of the run {text(made.record.path, 300)}."
    return page(f"{name}: a fomaml run", _header(made, name), sections, footer)


def _header(made: Page, name: str) -> str:
    result = made.record.result
    if result is None:
        return f"<h1>{name}</h1>\n{left_out(_unfinished(made))}"
    metric = metric_in(result)
    value = metric.text(result[metric.name], result["interval"])
    what = describe(result).splitlines()[0]
    after = f"{result['name']} after {result['steps']} inner steps: {result['measured']}, ± 95 % interval."
    lines = [
        f"<h1>{name}</h1>",
        f'<p class="figure">{text(value)}{" " + text(metric.unit) if metric.unit else ""}</p>',
        f'<p class="lead">{text(after, 300)}</p>',
        f"<p>{text(what[:1].upper() + what[1:], 1000)}.</p>",
    ]
    if won := verdict(result):
        lines.append(f"<p><strong>{text(won, 500)}.</strong></p>")
    if "unfinished" in result:
        lines.append(left_out(result["unfinished"]))
    return "\n".join(lines)


def left_out(why: str) -> str:
    return f'<p class="left-out">{text(why[:1].upper() + why[1:], 1000)}.</p>'


def _unfinished(made: Page) -> str:
    return f"the run has no result yet: {len(made.record.lines)} lines of measurements so far"


def _bought(made: Page) -> str:
    result = made.record.result
    if result is None:
        return left_out(_unfinished(made))
    parts = [made.figure("steps", lambda: plots.steps(made.record))]
    for own in (result, *result.get("others", ())):
        metric = metric_in(own)
        own.setdefault("measured", metric.name)
        apart = {row["to"]: metric.text(row["mean"], row["interval"]) for row in own["differences"]}
        rows = [
            [text(row["label"]), metric.text(row["mean"], row["interval"]), apart.get(row["label"], "")]
            for row in own["rows"]
        ]
        headings = ["", text(f"{own['measured']}, ± 95 % interval")]
        if apart:
            headings.append(text(f"{own['name']} minus this, on the same tasks"))
        else:
            rows = [row[:2] for row in rows]
        parts.append(table(headings, rows, f"Scores on {own['tasks']} unseen tasks", numbers=True))
    if not result["differences"]:
        parts.append(
            '<p class="quiet">The run has no baselines: what others reach on these tasks is not known.</p>'
        )
    return "\n".join(parts)


def _training(made: Page) -> str:
    record = made.record
    if not record.lines:
        return left_out("the run has no measurements: metrics.jsonl is empty or not there")
    found = made.figure("training", lambda: plots.training(record))
    told = "Thin lines are what was measured on the training tasks, thick ones their running mean."
    if record.validations:
        told += " Validation is on tasks of its own, after all the inner steps of the test."
    if record.result is not None and (weights := record.result.get("weights")):
        told += f" The weights are the {weights['kept']}, of iteration {weights['iteration']}."
    return f"{found}\n<p>{text(told, 1000)}</p>"


def _tasks(made: Page) -> str:
    looked, settings = made.looked, made.record.settings
    if looked is None:
        return left_out(made.missing)
    metric = looked.metric
    after = looked.scores[looked.steps]
    worst = looked.worst(1)[0] if after.min() < after.max() else None
    told = "The first tasks of the test, as they come"
    told += f", and the one of {len(looked.names)} with the worst score" if worst is not None else ""
    parts = [f"<p>{told}.</p>"]
    for task in looked.shown:
        name = looked.names[task.number]
        name = text(name[:1].upper() + name[1:]) + (", the worst of all" if task.number == worst else "")
        unit = f" {metric.unit}" if metric.unit else ""
        gain = f"{_score(made, task.before)}{unit} before, {_score(made, task.after)}{unit} after {looked.steps} steps"
        parts.append(f"<h3>{name}</h3>\n<p>{text(metric.name)}: {gain}.</p>")
        if task.curve is not None:
            draw = partial(plots.curve, task, looked.targets[0])
            parts.append(made.figure(f"task-{task.number}", draw))
        parts.append(of_task(task, looked, settings))
    return "\n".join(parts)


def _score(made: Page, value: float) -> str:
    scale = made.record.metric.scale
    return f"{scale * value:.1f}" if scale == 100 else f"{value:.4g}"


def _wrong(made: Page) -> str:
    looked = made.looked
    if looked is None:
        return left_out(made.missing)
    parts = [made.figure("scores", lambda: plots.scores(looked))]
    after, direction = looked.scores[looked.steps], looked.metric.direction
    best = float((direction * after).max())
    rows = [
        [
            text(looked.names[number]),
            *(_score(made, float(looked.scores[k][number])) for k in (0, looked.steps)),
        ]
        for number in looked.worst(LISTED)
        if not direction * float(after[number]) >= best  # a score that is no number too
    ]
    if rows:
        unit = f" in {looked.metric.unit}" if looked.metric.unit else ""
        headings = ["task", "before adaptation", f"after {looked.steps} steps"]
        caption = f"The worst of {len(looked.names)} tasks, {text(looked.metric.name)}{unit}"
        parts.append(table(headings, rows, caption, numbers=True))
    else:
        parts.append(f"<p>All {len(looked.names)} tasks have the same score after adaptation.</p>")
    if looked.truth is not None:
        for number in range(min(TARGETS, looked.truth.shape[1])):
            draw = partial(plots.predicted, looked, number)
            parts.append(made.figure(f"predicted-{number}", draw))
        return "\n".join(parts)
    matrix = made.figure("confusion", lambda: plots.confusion(looked))
    errors = [(pair, count) for pair, count in looked.confusions.most_common() if pair[0] != pair[1]]
    totals: dict[str, int] = {}
    for (true, _), count in looked.confusions.items():
        totals[true] = totals.get(true, 0) + count
    if not matrix:
        parts.append(
            f"<p>{len(totals)} classes are too many for a matrix; these are mistaken most often.</p>"
        )
    parts.append(matrix)
    rows = [
        [text(true), text(guess), str(count), str(totals[true])] for (true, guess), count in errors[:LISTED]
    ]
    headings = ["true class", "taken for", "times", "query examples of the class"]
    if rows:
        parts.append(table(headings, rows, "The most frequent mistakes after adaptation", numbers=True))
    else:
        parts.append("<p>No query example was mistaken for another class.</p>")
    return "\n".join(parts)


def _calibration(made: Page) -> str:
    looked, known = made.looked, made.record.calibrations
    parts = []
    if source_of(made.record.settings).kind == "regression":
        return "<p>A run that predicts numbers tells no confidence.</p>"
    if looked is not None and looked.reliable:
        parts.append(made.figure("calibration", lambda: plots.calibration(looked)))
        parts.append(
            f"<p>On {len(looked.names)} test tasks, batch norms by the support set, as an adapted model is used.</p>"
        )
    elif looked is None:
        parts.append(left_out(made.missing))
    rows = [
        [
            f"{own.ways}-way {own.shots}-shot", str(steps), f"{100 * row['accuracy']:.1f}", f"{row['temperature']:.3f}",
            f"{100 * row['error_before']:.1f}", f"{100 * row['error']:.1f}",
        ]
        for own in known
        for steps, row in own.by_steps.items()
    ]  # fmt: skip
    if rows:
        headings = [
            "validation tasks",
            "steps",
            "accuracy, %",
            "temperature",
            "error without it, %",
            "error with it, %",
        ]
        parts.append(table(headings, rows, "Calibration on validation tasks", numbers=True))
    else:
        told = f"fomaml calibrate {made.record.path}"
        parts.append(
            f"<p>The run is not calibrated: <code>{text(told, 300)}</code> fits temperatures on validation tasks.</p>"
        )
    return "\n".join(parts)


def _time(made: Page) -> str:
    record, rows = made.record, []
    result = record.result or {}
    spent = {key.removesuffix("_seconds"): value for key, value in result.items() if key.endswith("_seconds")}
    if not spent and record.lines and "seconds" in record.lines[-1]:
        spent = {"training, so far": record.lines[-1]["seconds"]}
    total = math.fsum(spent.values())
    for name, seconds in spent.items():
        share = f"{100 * seconds / total:.0f} %" if total else ""
        rows.append([text(name), duration(seconds), share])
    parts = [made.figure("pace", lambda: plots.pace(record))]
    if rows:
        parts.append(table(["", "time", "share"], rows, "Time of the run", numbers=True))
        parts.append('<p class="quiet">A run does not record how long its test and its baselines took.</p>')
    else:
        parts.append("<p>The run has not recorded any time.</p>")
    return "\n".join(parts)


def _repeat(made: Page) -> str:
    record = made.record
    parts = [f"<pre><code>{text(command(record.settings), 10000)}</code></pre>"]
    if record.settings.seconds is not None:
        parts.append("<p>Its budget was a time, so that it cannot be repeated bit for bit.</p>")
    result = record.result or {}
    facts = [
        [name, text(result[name])]
        for name in ("date", "commit", "machine", "gpu", "threads", "torch", "seed")
        if result.get(name) is not None
    ]
    file = LAST if made.weights == "last" and (record.path / LAST).exists() else WEIGHTS
    facts.append(["weights looked at", file])
    parts.append(table(["", "value"], facts, "Where and when"))
    rows = [
        [text(name), text(value, 200), text(heading)]
        for heading, name, value in settings_rows(record.settings)
    ]
    settings = table(["setting", "value", "of"], rows, "All settings")
    parts.append(f"<details><summary>All {len(rows)} settings</summary>{settings}</details>")
    return "\n".join(parts)
