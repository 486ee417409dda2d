"""`fomaml report` of a comparison: its methods beside each other, as one page that holds all it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fomaml import regular
from fomaml.app import compare_plots as plots
from fomaml.app.commands import given
from fomaml.app.compare import COMPARISON, SETTINGS, cell, introduced
from fomaml.app.report_examples import table, text
from fomaml.app.report_options import ReportOptions
from fomaml.app.report_page import FOLDER, PAGE, figure, left_out
from fomaml.app.report_plots import check_matplotlib
from fomaml.app.report_style import page
from fomaml.app.run_record import Record, command, read_record
from fomaml.app.rundir import CONFIG
from fomaml.app.scores import metric_in
from fomaml.app.wording import option as typed
from fomaml.errors import InputError
from fomaml.files import write_text
from fomaml.sealed import unsealed


@dataclass
class Comparison:
    """A comparison as its folder tells it. rows: of the methods that were trained. records: of their runs, by title."""

    path: Path
    folder: Path
    result: dict[str, Any]
    records: dict[str, Record]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for row in self.result["rows"] if "failed" not in row]

    def figure(self, name: str, draw: Callable[[], Any]) -> str:
        return figure(self.folder, name, draw)


def is_comparison(path: Path) -> bool:
    return (path.expanduser() / COMPARISON).is_file()


def report_comparison(options: ReportOptions) -> Path:
    """Write report.html and its plots; returns the page's path. The comparison is only read.

    Raises:
        InputError: a damaged comparison; options that are of runs; no matplotlib.
    """
    path = options.run.expanduser()
    if asked := [name for name in given(options) if name not in ("run", "out")]:
        raise InputError(
            f"{path} holds a comparison, whose page takes no {typed(asked[0])}: give it with one of its runs"
        )
    check_matplotlib()
    made = Comparison(path, (options.out or path / FOLDER).expanduser(), _read(path / COMPARISON), {})
    for row in made.rows:
        if (path / row["algorithm"] / CONFIG).is_file():
            made.records[row["name"]] = read_record(path / row["algorithm"])
    write_text(made.folder / PAGE, _page(made))
    return made.folder / PAGE


def _read(path: Path) -> dict[str, Any]:
    try:
        found = unsealed(regular.read_text(path))
        introduced(found)
        for row in found["rows"]:
            if "failed" not in row:
                for own in (row, row.get("difference"), *row["curve"].values()):
                    cell(own, metric_in(found))
                [
                    row[name]
                    for name in ("iterations", "seconds", "tasks_per_second", "peak_memory_mb", "settings")
                ]
        [(point["iteration"] + 0, point["cosine"] + 0) for point in found["cosines"]]
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise InputError(f"{path} is damaged: it is not the result of a comparison") from None
    return found


def _page(made: Comparison) -> str:
    name = text(made.path.resolve().name)
    sections = [
        ("methods", "The methods beside each other", _methods(made)),
        ("steps", "What each inner step buys", _steps(made)),
        ("training", "Meta-training", _training(made)),
        ("first-order", "What first order leaves out", _first_order(made)),
        ("costs", "What each costs", _costs(made)),
        ("repeat", "Settings, and how to repeat it", _repeat(made)),
    ]
    footer = f"Written by <code>fomaml report</code> from the files of the comparison {text(made.path, 300)}."
    return page(f"{name}: a fomaml comparison", _header(made, name), sections, footer)


def _header(made: Comparison, name: str) -> str:
    metric = metric_in(made.result)
    what, how = introduced(made.result)
    lines = [f"<h1>{name}</h1>"]
    able = [row for row in made.rows if plots.finite(row)]
    if able:
        best = max(able, key=lambda row: metric.direction * row["mean"])
        unit = f" {text(metric.unit)}" if metric.unit else ""
        equal = [row["name"] for row in able if row["mean"] == best["mean"]]
        who = f"{text(equal[0])} has" if len(equal) == 1 else f"{text(' and '.join(equal), 300)} have"
        measured = text(made.result["measured"].removesuffix(" in %"))
        most = "highest" if metric.direction > 0 else "lowest"
        lines += [
            f'<p class="figure">{text(metric.text(best["mean"], best["interval"]))}{unit}</p>',
            f'<p class="lead">{who} the {most} {measured} of '
            f"{len(made.result['rows'])} methods after {made.result['steps']} inner steps, ± 95 % interval.</p>",
        ]
    lines.append(f"<p>{text(what, 1000)}; {text(how, 1000)}.</p>")
    return "\n".join([*lines, *_failures(made)])


def _failures(made: Comparison) -> list[str]:
    return [
        left_out(f"{row['name']} failed: {row['failed']}") for row in made.result["rows"] if "failed" in row
    ]


def _methods(made: Comparison) -> str:
    result, metric = made.result, metric_in(made.result)
    if not made.rows:
        return left_out("no method was trained to its end")
    rows = []
    for row in made.rows:
        apart = row.get("difference")
        told = plots.verdict(apart, metric) if apart and plots.finite(apart) else ""
        rows.append(
            [text(row["name"]), text(cell(row, metric)), text(cell(apart, metric, signed=True)), told]
        )
    headings = [
        "",
        text(f"{result['measured']}, ± 95 % interval"),
        "minus FOMAML, on the same tasks",
        "than FOMAML",
    ]
    if not any(row.get("difference") for row in made.rows):
        headings, rows = headings[:2], [row[:2] for row in rows]
    caption = f"After {result['steps']} inner steps, on the same {result['tasks']} unseen tasks"
    return "\n".join(
        [
            made.figure("differences", lambda: plots.differences(made.rows, metric)),
            table(headings, rows, caption, numbers=True),
            '<p class="quiet">Intervals are over tasks, of one training run each: another seed trains another start, '
            "and its spread is not in them.</p>",
        ]
    )


def _steps(made: Comparison) -> str:
    result, metric = made.result, metric_in(made.result)
    if not made.rows:
        return left_out("no method was trained to its end")
    counts = sorted({int(count) for row in made.rows for count in row["curve"]})
    rows = [
        [text(row["name"]), *(text(cell(row["curve"].get(str(count)), metric)) for count in counts)]
        for row in made.rows
    ]
    caption = text(f"{result['measured']} by the number of inner steps, ± 95 % interval", 200)
    headings = ["", *map(str, counts)]
    drawn = made.figure("steps", lambda: plots.steps(made.rows, metric, result["measured"]))
    return f"{drawn}\n{table(headings, rows, caption, numbers=True)}"


def _training(made: Comparison) -> str:
    drawn = made.figure("training", lambda: plots.training(made.records, "seconds" in made.result["budget"]))
    if made.records and not drawn:
        drawn = (
            "<p>Nothing is measured while the methods train, so that their times are of training alone; data with "
            "validation classes or tasks have a curve.</p>"
        )
    gone = [row["name"] for row in made.rows if row["name"] not in made.records]
    if gone:
        drawn += left_out(f"the run directories of {', '.join(gone)} are not there")
    return drawn or left_out("nothing of the training was measured")


def _first_order(made: Comparison) -> str:
    points = made.result["cosines"]
    if not points:
        return left_out("the meta-gradients were not compared")
    rows = [[str(point["iteration"]), f"{point['cosine']:.4f}"] for point in points]
    told = "The cosine of FOMAML's and MAML's meta-gradient on the same tasks, along FOMAML's training"
    numbers = table(["iteration", "cosine"], rows, told, numbers=True)
    return "\n".join(
        [
            made.figure("cosines", lambda: plots.cosines(points)),
            f"<details><summary>The numbers</summary>{numbers}</details>",
        ]
    )


def _costs(made: Comparison) -> str:
    if not made.rows:
        return left_out("no method was trained to its end")
    rows = []
    for row in made.rows:
        peak, products = row["peak_memory_mb"], row.get("hessian_products_per_task", 0)
        gradients = f"{row.get('gradients_per_task', '?')}" + (f" + {products} Hv" if products else "")
        rows.append(
            [
                text(row["name"]), str(row["iterations"]), f"{row['seconds']:.1f}", f"{row['tasks_per_second']:.0f}",
                "?" if peak is None else f"{peak:.0f}", gradients, text(row.get("engine", "")),
            ]
        )  # fmt: skip
    headings = ["", "iterations", "seconds", "tasks/s", "peak memory, MB", "gradients per task", "engine"]
    told = (
        f"Peak memory: {text(made.rows[0].get('memory', ''))} during training. Gradients per task: of an outer step; "
        "Hv: Hessian-vector products. Data, first uses and evaluation are outside the measured time."
    )
    return table(headings, rows, "The training of each method", numbers=True) + f'<p class="quiet">{told}</p>'


def _repeat(made: Comparison) -> str:
    result, parts = made.result, []
    if "command" in result:
        parts.append(f"<pre><code>{text(result['command'], 10000)}</code></pre>")
    if "seconds" in result["budget"]:
        parts.append("<p>The budget was a time, so that it cannot be repeated bit for bit.</p>")
    if made.records:
        lines = "\n".join(text(command(record.settings), 10000) for record in made.records.values())
        parts.append(
            f"<details><summary>Each method alone</summary><pre><code>{lines}</code></pre></details>"
        )
        one = made.path / next(row["algorithm"] for row in made.rows if row["name"] in made.records)
        parts.append(f"<p>A page of each: <code>{text(f'fomaml report {one}', 300)}</code> and so on.</p>")
    facts = [
        [name, text(result[name])]
        for name in ("date", "commit", "machine", "device", "threads", "torch", "seed")
        if result.get(name) is not None
    ]
    parts.append(table(["", "value"], facts, "Where and when"))
    if made.rows:
        names = [name for name in SETTINGS if any(row["settings"].get(name) is not None for row in made.rows)]
        rows = [
            [text(row["name"]), *(text(_value(row["settings"].get(name)), 200) for name in names)]
            for row in made.rows
        ]
        parts.append(table(["", *names], rows, "Settings of each method"))
    return "\n".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {own}" for name, own in value.items())
    return "" if value is None else str(value)
