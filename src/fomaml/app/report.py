"""Results as a table of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fomaml.app.scores import metric_in
from fomaml.metrics import Metric


def table(columns: Sequence[tuple[str, dict]]) -> str:
    """One column per result, one row per method and number of inner steps; columns of one metric.

    columns: (heading, result) pairs; a result has `metric`, `measured`, `rows` and `differences`, see judge.py.
    """
    metric = metric_in(columns[0][1])
    labels: list[str] = []
    for _, result in columns:
        labels += [row["label"] for row in result["rows"] if row["label"] not in labels]
    lines = [[f"{columns[0][1]['measured']}, ± 95 % interval", *(text for text, _ in columns)]]
    for label in labels:
        lines.append([label, *(_cell(result, label, metric) for _, result in columns)])
    return align(lines)


def _cell(result: dict, label: str, metric: Metric) -> str:
    for row in result["rows"]:
        if row["label"] == label:
            return metric.text(row["mean"], row["interval"])
    return ""


def align(lines: list[list[str]], left: bool = False) -> str:
    """Cells as text in columns, the first line the heading; all but the first column to the right, or not."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    flush = str.ljust if left else str.rjust
    text = [
        "  ".join([line[0].ljust(widths[0]), *(flush(c, w) for c, w in zip(line[1:], widths[1:]))])
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in (text[0], "─" * len(text[0]), *text[1:]))


def verdict(result: dict) -> str:
    """One line: whether the learner beats every baseline by more than the interval of the paired difference."""
    metric, rows = metric_in(result), result["differences"]
    if not rows:
        return ""
    gains = [(metric.direction * row["mean"], row["interval"], row["to"]) for row in rows]
    # what beats the learner comes first, then what is not told apart from it
    lost = [gain for gain in gains if gain[0] < -gain[1]]
    unclear = [gain for gain in gains if not gain[0] > gain[1]]
    gain, interval, to = min(lost or unclear or gains)
    how = "by" if metric.direction > 0 else "by a lower error of"
    points = " points" if metric.unit == "%" else ""
    text = f"{metric.text(gain, interval)}{points}, on the same tasks"
    name = f"{result['name']} after {result['steps']} step{'' if result['steps'] == 1 else 's'}"
    if not unclear:
        return f"{name} beats every baseline; the best, {to}, {how} {text}"
    outcome = "LOSES to" if lost else "is not told apart from"
    return f"{name} {outcome} the baseline {to}: {text}"


def duration(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 10 min."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
