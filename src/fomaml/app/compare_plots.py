"""The plots of a comparison's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fomaml.app.report_plots import (
    BLUE,
    DASHES,
    GREEN,
    GREY,
    INK,
    OF_BASELINES,
    ORANGE,
    VIOLET,
    drawing,
    short,
    smooth,
)
from fomaml.app.run_record import Record
from fomaml.metrics import Metric

COLOURS = (ORANGE, BLUE, *OF_BASELINES[:1], VIOLET, *OF_BASELINES[2:])
LINES, MARKERS = ("-", *DASHES), "osD^vPX"
VERDICTS = {"better": (GREEN, "o"), "worse": (ORANGE, "s"), "not told apart": (GREY, "D")}
NAME = 30


def verdict(difference: Mapping[str, float], metric: Metric) -> str:
    """Whether a method is better than FOMAML by more than the interval of the paired difference."""
    gain = metric.direction * difference["mean"]
    if abs(gain) <= difference["interval"]:
        return "not told apart"
    return "better" if gain > 0 else "worse"


def finite(found: Mapping[str, float | None] | None) -> bool:
    return found is not None and found["mean"] is not None


def differences(rows: Sequence[Mapping[str, Any]], metric: Metric) -> tuple[Any, str] | None:
    """Each method's paired difference from FOMAML with its interval; nothing where there is none."""
    shown = [row for row in rows if finite(row.get("difference"))]
    if not shown:
        return None
    unit = f", in {'points' if metric.unit == '%' else metric.unit}" if metric.unit else ""
    with drawing(height=1.3 + 0.32 * len(shown)) as (figure, (axes,)):
        axes.axvline(0, color=INK, linewidth=1)
        for place, row in enumerate(shown):
            colour, marker = VERDICTS[verdict(row["difference"], metric)]
            mean, interval = (metric.scale * row["difference"][name] for name in ("mean", "interval"))
            axes.errorbar(mean, place, xerr=interval, color=colour, marker=marker, capsize=4)
        axes.set_yticks(range(len(shown)), [short(row["name"], NAME) for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        side = "right" if metric.direction > 0 else "left"
        axes.set(
            title="Difference from FOMAML on the same tasks",
            xlabel=f"{metric.name}{unit}; better is on the {side}",
        )
    told = "; ".join(
        f"{row['name']} {metric.text(row['difference']['mean'], row['difference']['interval'])}, "
        f"{verdict(row['difference'], metric)}"
        for row in shown
    )
    return figure, f"Differences from FOMAML with 95 % intervals: {told}."


def steps(rows: Sequence[Mapping[str, Any]], metric: Metric, measured: str) -> tuple[Any, str] | None:
    """The score of each method over inner steps, with its interval as a band."""
    shown = [(row, _points(row, metric)) for row in rows]
    if not any(points for _, points in shown):
        return None
    places: set[int] = set()
    with drawing(height=3.4 + 0.1 * len(rows)) as (figure, (axes,)):
        for number, (row, points) in enumerate(shown):
            if not points:
                continue
            x, y, apart = zip(*points)
            places |= {*x}
            colour = COLOURS[number % len(COLOURS)]
            low, high = zip(*((mean - own, mean + own) for mean, own in zip(y, apart)))
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(x, y, linestyle=LINES[number % len(LINES)], color=colour, marker=MARKERS[number % len(MARKERS)],
                      markersize=4, label=short(row["name"], NAME))  # fmt: skip
        axes.set(title=_sentence(measured), xlabel="inner steps on the support set")
        axes.set_xticks(sorted(places))
        figure.legend(loc="outside lower left", ncols=4)
    return (
        figure,
        f"{_sentence(measured)} by the number of inner steps, bands are 95 % intervals. The table has the numbers.",
    )


def _points(row: Mapping[str, Any], metric: Metric) -> list[tuple[int, float, float]]:
    """(steps, mean, interval) where the score is a number, in the metric's unit."""
    return [
        (int(count), metric.scale * own["mean"], metric.scale * own["interval"])
        for count, own in sorted(row["curve"].items(), key=lambda pair: int(pair[0]))
        if finite(own)
    ]


def training(records: Mapping[str, Record], by_seconds: bool) -> tuple[Any, str] | None:
    """The score after adaptation in meta-training, by method; of validation where there is one."""
    found = {}
    for name, record in records.items():
        lines, key = (record.validations, "validation") if record.validations else (record.training, "after")
        points = [
            (line["seconds" if by_seconds else "iteration"], line[key])
            for line in lines
            if line.get(key) is not None
        ]
        if len(points) > 1:
            found[name] = (points, key, record.metric.scale)
    if not found:
        return None
    kinds = {key for _, key, _ in found.values()}
    with drawing(height=3.2 + 0.1 * len(found)) as (figure, (axes,)):
        for number, (name, (points, key, scale)) in enumerate(found.items()):
            colour = COLOURS[number % len(COLOURS)]
            x, y = zip(*points)
            y = [scale * value for value in y]
            if key == "after":
                axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(x, smooth(y) if key == "after" else y, linestyle=LINES[number % len(LINES)], color=colour,
                      marker="o" if key == "validation" else "", markersize=3, label=short(name, NAME))  # fmt: skip
        measured = next(iter(records.values())).measured
        axes.set(title=_sentence(measured), xlabel="seconds of training" if by_seconds else "iteration")
        figure.legend(loc="outside lower left", ncols=4)
    what = (
        "on validation tasks"
        if kinds == {"validation"}
        else "on training tasks, thick lines are running means"
    )
    told = "; ".join(
        f"{name} from {scale * p[0][1]:.3g} to {scale * p[-1][1]:.3g}"
        for name, (p, _, scale) in found.items()
    )
    return figure, f"After adaptation, {what}: {told}."


def cosines(points: Sequence[Mapping[str, float]]) -> tuple[Any, str]:
    """The cosine of FOMAML's and MAML's meta-gradient along FOMAML's training."""
    x, y = ([point[name] for point in points] for name in ("iteration", "cosine"))
    with drawing(height=2.4) as (figure, (axes,)):
        axes.plot(x, y, color=BLUE, marker="o", markersize=4)
        axes.axhline(1, color=INK, linewidth=1)
        axes.set(title="Cosine of the meta-gradients of FOMAML and MAML", xlabel="iteration")
        axes.set_ylim(min(0.0, *y), 1.05)
    return (
        figure,
        f"Cosine from {min(y):.3f} to {max(y):.3f}; 1 is the same direction, as if first order left out nothing.",
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
