"""The plots of a run's page, by matplotlib: as inline SVG that takes the page's colours, and as files."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fomaml.app.looked_at import Looked, TaskLooked
from fomaml.app.run_record import Record
from fomaml.errors import InputError
from fomaml.files import replacing

# Ink and lines have colours of their own, which inline SVG leaves to the page; the others are readable on light and on
# dark (3 to 1 or more on both).
INK, LINE = "#17191c", "#c8ccd2"
BLUE, ORANGE, GREEN, VIOLET, GREY = "#2f7fd0", "#c9661a", "#2c8c5a", "#8d63c8", "#7b8088"
OF_BASELINES = (GREEN, VIOLET, "#b8568f", "#8a7a1f", GREY, "#3a8f9c")
DASHES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)))
MOST_CLASSES = 24  # of a matrix that is still read
LETTERS = 22
LEAST_WIDTH = 30  # rem: on a narrower screen a plot is scrolled, so that its text is read
STYLE = {
    "svg.fonttype": "none",  # text is text: it is searched, read aloud, and takes the page's font
    "svg.hashsalt": "fomaml",
    "text.parse_math": False,  # a name with dollars is a name
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.edgecolor": LINE, "axes.labelcolor": INK, "text.color": INK, "axes.titlecolor": INK,
    "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "grid.color": LINE, "grid.alpha": 0.5, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.labelcolor": INK, "lines.linewidth": 1.6,
}  # fmt: skip


def check_matplotlib() -> None:
    """Raise `InputError` where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("the plots need matplotlib: pip install 'fomaml[plots]'") from None


@contextmanager
def drawing(width: float = 7.2, height: float = 3.2, columns: int = 1) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its axes, of one row, in the page's style."""
    check_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, list(figure.subplots(1, columns, squeeze=False)[0])


def saved(name: str, folder: Path, draw: Callable[[], tuple[Any, str]]) -> tuple[str, str]:
    """Draw a plot, keep it as NAME.png and NAME.svg, and give it as inline SVG, with its text for those who do not see
    it.
    """
    with warnings.catch_warnings():
        # the PNG lacks letters that matplotlib's font lacks; SVG has them as text
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure, text = draw()
        import matplotlib

        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
            with replacing(folder / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=160, facecolor="white")
            plain: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            with replacing(folder / f"{name}.svg") as temporary:
                figure.savefig(temporary, format="svg", facecolor="white", metadata=plain)
            own = io.StringIO()
            figure.savefig(own, format="svg", transparent=True, metadata=plain)
    return _inline(own.getvalue(), name), text


def _inline(svg: str, name: str) -> str:
    """The svg element alone, of no size of its own, in the page's colours; its ids are apart from those of others."""
    svg = svg[svg.index("<svg") :]
    start, rest = svg[: svg.index(">") + 1], svg[svg.index(">") + 1 :]
    width = float(start.split('viewBox="0 0 ')[1].split()[0])
    start = re.sub(r' (?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", start)
    start = start.replace(
        "<svg", f'<svg style="max-width: {width / 10:.1f}rem; min-width: min({width / 10:.1f}rem, 30rem)"'
    )
    # text of the run stands between tags: what is replaced is within them
    rest = re.sub(r"<[^>]*>", lambda tag: _of_page(tag[0], name), rest)
    return start + rest


def _of_page(tag: str, name: str) -> str:
    tag = re.sub(r'\b(id=")', rf"\g<1>{name}-", tag)
    tag = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", tag).replace("xlink:href", "href")
    return tag.replace(INK, "currentColor").replace(LINE, "var(--line)")


def short(name: str, letters: int = LETTERS) -> str:
    """A name as it fits into a plot, in one line."""
    own = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    return own if len(own) <= letters else own[: letters - 1] + "…"


# --- what was measured ----------------------------------------------------------------------------


def training(record: Record) -> tuple[Any, str]:
    """The meta-loss, and the scores before and after adaptation, over the iterations."""
    curves = record.curves()
    losses = curves.pop("meta-loss", [])
    with drawing(height=3.4, columns=2) as (figure, (left, right)):
        if losses:
            x, y = zip(*losses)
            left.plot(x, y, color=BLUE, alpha=0.35, linewidth=1)
            left.plot(x, smooth(y), color=BLUE)
        left.set(title="Meta-loss", xlabel="iteration")
        looks = {
            "before adaptation": (GREY, "--", ""), "after adaptation": (ORANGE, "-", ""), "validation": (BLUE, "-", "o")
        }  # fmt: skip
        for name, points in curves.items():
            if not points:
                continue
            colour, dash, marker = looks[name]
            x, y = zip(*points)
            if marker:
                right.plot(x, y, dash, color=colour, marker=marker, markersize=3.5, label=name)
            else:
                right.plot(x, y, "-", color=colour, alpha=0.3, linewidth=1)
                right.plot(x, smooth(y), dash, color=colour, label=f"training, {name}")
        right.set(title=_sentence(record.measured), xlabel="iteration")
        if right.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower right", ncols=3)
    told = [
        f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}"
        for name, points in {"meta-loss": losses, **curves}.items()
        if points
    ]
    return figure, f"Curves over the iterations: {', '.join(told)}."


def smooth(values: Sequence[float]) -> np.ndarray:
    """A running mean over a tenth of the points, of fewer at the ends."""
    reach = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    places = np.arange(len(values))
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def steps(record: Record) -> tuple[Any, str]:
    """The score over inner steps, with the baselines as lines."""
    assert record.result is not None
    scale, result = record.metric.scale, record.result
    own = [row for row in result["rows"] if "steps" in row and row["label"].startswith(f"{result['name']}, ")]
    others = [row for row in result["rows"] if row not in own]
    with drawing(height=3.2 + 0.1 * len(others)) as (figure, (axes,)):
        x = [row["steps"] for row in own]
        y = [scale * row["mean"] for row in own]
        errors = [scale * row["interval"] if math.isfinite(row["interval"]) else 0 for row in own]
        axes.errorbar(
            x, y, yerr=errors, color=ORANGE, marker="o", capsize=3, label=short(result["name"], 30), zorder=5
        )
        for number, row in enumerate(others):
            count = len(OF_BASELINES)
            colour, dash = OF_BASELINES[number % count], DASHES[(number + number // count) % len(DASHES)]
            axes.axhline(scale * row["mean"], color=colour, linestyle=dash, label=short(row["label"], 48))
        axes.set(title=_sentence(record.measured), xlabel="inner steps on the support set")
        axes.set_xticks(sorted(set(x)))
        if others:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(
                handles[-1:] + handles[:-1], labels[-1:] + labels[:-1], loc="outside lower left", ncols=2
            )
    lines = "; level lines are the baselines" if others else ""
    return (
        figure,
        f"{result['name']} on unseen tasks, by the number of inner steps{lines}. The table has the numbers.",
    )


def pace(record: Record) -> tuple[Any, str] | None:
    """The seconds that an iteration took; nothing where too little was measured."""
    points = [(line["iteration"], line["seconds"]) for line in record.training if "seconds" in line]
    if len(points) < 3:
        return None
    iterations, seconds = (np.array(own, dtype=float) for own in zip(*points))
    step = np.diff(iterations)
    keep = step > 0
    each = 1000 * np.diff(seconds)[keep] / step[keep]
    with drawing(height=2.4) as (figure, (axes,)):
        axes.plot(iterations[1:][keep], each, drawstyle="steps-pre", color=BLUE)
        axes.set(title="Milliseconds of training per iteration", xlabel="iteration")
        axes.set_ylim(bottom=0)
    middle = float(np.median(each))
    return (
        figure,
        f"Milliseconds per iteration: {middle:.3g} in the middle, from {each.min():.3g} to {each.max():.3g}.",
    )


# --- what was looked at ---------------------------------------------------------------------------


def scores(looked: Looked) -> tuple[Any, str]:
    """How the scores of tasks are spread, before and after."""
    scale = looked.metric.scale
    found = {
        f"after {looked.steps} steps": looked.scores[looked.steps],
        "before adaptation": looked.scores[0],
    }
    with drawing(height=2.6) as (figure, (axes,)):
        both = scale * np.concatenate([own.numpy() for own in found.values()])
        both = both[np.isfinite(both)]
        bins = np.linspace(both.min(), both.max() + 1e-12, 25) if len(both) else 10
        for (name, own), colour, hatch in zip(found.items(), (ORANGE, GREY), ("", "//")):
            values = scale * own.numpy()
            axes.hist(values[np.isfinite(values)], bins, color=colour, alpha=0.6, label=name, hatch=hatch)
        unit = f" in {looked.metric.unit}" if looked.metric.unit else ""
        axes.set(title="Tasks by their score", xlabel=f"{looked.metric.name}{unit}", ylabel="tasks")
        axes.legend()
    ends = [
        f"{name} from {scale * float(s.min()):.3g} to {scale * float(s.max()):.3g}"
        for name, s in found.items()
    ]
    return figure, f"Histogram of the scores of {len(looked.names)} tasks: {'; '.join(ends)}."


def confusion(looked: Looked) -> tuple[Any, str] | None:
    """The shares of each true class by what they were taken for; nothing where there are too many classes."""
    rows = sorted({true for true, _ in looked.confusions})
    columns = [*rows, *sorted({guess for _, guess in looked.confusions} - {*rows})]
    if len(columns) > MOST_CLASSES:
        return None
    counts = np.array([[looked.confusions[true, guess] for guess in columns] for true in rows])
    shares = counts / counts.sum(1, keepdims=True)
    size = min(7.2, 2.4 + 0.42 * len(columns))
    with drawing(size, 1.3 + 0.32 * len(rows)) as (figure, (axes,)):
        from matplotlib.patches import Rectangle

        for row, column in np.ndindex(*shares.shape):
            share = shares[row, column]
            if share:
                colour = GREEN if columns[column] == rows[row] else ORANGE
                corner = column - 0.5, row - 0.5
                axes.add_patch(
                    Rectangle(corner, 1, 1, facecolor=colour, alpha=0.12 + 0.5 * share, linewidth=0)
                )
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center")
        axes.set_xticks(range(len(columns)), [short(name, 14) for name in columns], rotation=45, ha="left")
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_yticks(range(len(rows)), [short(name, 18) for name in rows])
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), ylabel="true class")
        axes.set_xlabel("what it was taken for, in % of the true class")
        axes.grid(False)
    right = sum(number for (true, guess), number in looked.confusions.items() if true == guess)
    return (figure, f"Confusion matrix: {right} of {counts.sum()} query examples are on the diagonal.")


def predicted(looked: Looked, target: int) -> tuple[Any, str]:
    """Predicted against true values of one target, before and after."""
    assert looked.truth is not None and looked.before is not None and looked.after is not None
    truth, before, after = (own[:, target].numpy() for own in (looked.truth, looked.before, looked.after))
    with drawing(4.6, 4.2) as (figure, (axes,)):
        for values, name, colour, mark in (
            (before, "before adaptation", GREY, "x"), (after, f"after {looked.steps} steps", ORANGE, "o")
        ):  # fmt: skip
            axes.plot(truth, values, mark, color=colour, markersize=3, alpha=0.6, label=name)
        ends = [float(truth.min()), float(truth.max())]
        axes.plot(ends, ends, color=INK, linewidth=1, label="right")
        axes.set(xlabel="true", ylabel="predicted", title=short(looked.targets[target], 40))
        axes.legend()
    apart = [float(np.sqrt(np.mean((values - truth) ** 2))) for values in (before, after)]
    text = f"root mean squared error {apart[0]:.3g} before and {apart[1]:.3g} after adaptation"
    return figure, f"Predicted against true values of {len(truth)} query examples: {text}."


def calibration(looked: Looked) -> tuple[Any, str]:
    """Accuracy over confidence, without and with a temperature."""
    with drawing(4.6, 4.0) as (figure, (axes,)):
        axes.plot([0, 100], [0, 100], color=INK, linewidth=1, label="as it should be")
        for (name, own), colour, mark in zip(looked.reliable.items(), (GREY, ORANGE), ("s", "o")):
            there = own.examples > 0
            x, y = (100 * part[there].numpy() for part in (own.confidence, own.accuracy))
            axes.plot(
                x, y, color=colour, marker=mark, markersize=4, label=f"{name}: {100 * own.error:.1f} % off"
            )
        axes.set(
            xlabel="confidence in %", ylabel="right in %", title="Reliability", xlim=(0, 101), ylim=(0, 101)
        )
        axes.legend(loc="upper left")
    text = "; ".join(
        f"{name}, the calibration error is {100 * own.error:.1f} %" for name, own in looked.reliable.items()
    )
    return figure, f"Accuracy over confidence: {text}."


def curve(task: TaskLooked, target: str) -> tuple[Any, str]:
    """A function of one number: support and query points, and the curves before and after."""
    assert task.curve is not None
    x, before, after = (own.numpy() for own in task.curve)
    (support, goals), (query, truth) = (
        (part.inputs.flatten().numpy(), part.targets.flatten().numpy()) for part in task.task
    )
    with drawing(height=2.6) as (figure, (axes,)):
        axes.plot(x, before, "--", color=GREY, label="before adaptation")
        axes.plot(x, after, color=ORANGE, label="after adaptation")
        axes.plot(query, truth, "o", color=BLUE, markersize=4, fillstyle="none", label="query, true")
        axes.plot(support, goals, "^", color=INK, markersize=5, label="support")
        axes.set(ylabel=short(target))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return (
        figure,
        f"{len(support)} support points, {len(query)} query points, and the predictions before and after.",
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
