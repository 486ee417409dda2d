"""`fomaml show`: a run's result and its curves, in the terminal."""

from __future__ import annotations

import math
from pathlib import Path

from fomaml.app import report_plots as plots
from fomaml.app.judge import describe
from fomaml.app.run_record import Record, read_record
from fomaml.errors import InputError

WIDTH, HEIGHT = 60, 8  # characters of a chart
BLOCKS = " ▁▂▃▄▅▆▇█"


def show_run(run: Path) -> str:
    """The curves of a run and its result, or how far it is."""
    record = read_record(run)
    parts = [chart(name, points, _unit(record, name)) for name, points in record.curves().items() if points]
    if record.result is None:
        done = record.lines[-1]["iteration"] if record.lines else 0
        parts.append(f"no result yet: {done} of {record.settings.iterations} iterations")
    else:
        parts.append(describe(record.result).rstrip())
    return "\n\n".join(parts)


def _unit(record: Record, name: str) -> str:
    metric = record.metric
    return "" if name == "meta-loss" else f"{metric.name}{f' in {metric.unit}' if metric.unit else ''}"


def draw_run(run: Path, folder: Path) -> list[Path]:
    """Draw the curves of a run, and its score over inner steps, as PNG and SVG; returns what was written.

    Raises:
        InputError: no matplotlib; a run without measurements.
    """
    record = read_record(run)
    plots.check_matplotlib()
    draws = {}
    if record.lines:
        draws["training"] = lambda: plots.training(record)
    if record.result is not None:
        draws["steps"] = lambda: plots.steps(record)
    if not draws:
        raise InputError(f"{run} has no measurements to draw yet")
    folder = folder.expanduser()
    for name, draw in draws.items():
        plots.saved(name, folder, draw)
    return [folder / f"{name}.{kind}" for name in draws for kind in ("png", "svg")]


def chart(name: str, points: list[tuple[float, float]], unit: str = "") -> str:
    """A chart of characters: the mean of the points that fall into each column, between the least and the greatest.

    points: (iteration, value), ascending.
    """
    iterations = [iteration for iteration, _ in points]
    first, last = iterations[0], iterations[-1]
    columns: list[list[float]] = [[] for _ in range(min(WIDTH, len(points)))]
    for iteration, value in points:
        place = (iteration - first) / (last - first) if last > first else 0
        columns[min(int(place * len(columns)), len(columns) - 1)].append(value)
    heights = [math.fsum(own) / len(own) if own else math.nan for own in columns]
    known = [height for height in heights if not math.isnan(height)]
    if not known:
        return f"{name}: no finite numbers"
    low, high = min(known), max(known)
    eighths = [
        0
        if math.isnan(height)
        else 1 + round((8 * HEIGHT - 1) * ((height - low) / (high - low) if high > low else 0.5))
        for height in heights
    ]
    labels = [f"{high:.4g}", *[""] * (HEIGHT - 2), f"{low:.4g}"]
    width = max(map(len, labels))
    title = f"{name}{f', {unit}' if unit else ''}"
    lines = [f"{title}: {points[0][1]:.4g} → {points[-1][1]:.4g}"]
    for row, label in zip(range(HEIGHT - 1, -1, -1), labels):
        cells = "".join(BLOCKS[min(max(full - 8 * row, 0), 8)] for full in eighths)
        lines.append(f"{label:>{width}} ┤{cells}".rstrip())
    ends = f"{first:g}".ljust(max(len(heights) - len(f"{last:g}"), len(f"{first:g}") + 1)) + f"{last:g}"
    return "\n".join([*lines, " " * (width + 2) + ends])
