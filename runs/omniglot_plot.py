"""Validation accuracy against seconds of training, a line for each run: metrics.jsonl → PNG."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fomaml.app.cli import told_in_one_line
from fomaml.app.parser import option, parse, positional
from fomaml.errors import InputError


@dataclass(frozen=True)
class Options:
    """Plot the validation accuracy of run directories, or of the folders kept under docs/results/, against the
    seconds of training. A label comes after the path with a colon: `out/a:FOMAML out/b:MAML`.
    """

    runs: tuple[str, ...] = positional(
        "the folders, each with its label if it is not to be the folder's name", metavar="RUNS"
    )
    out: Path = option("the PNG file to write", Path("omniglot.png"))
    floor: float = option("the lowest accuracy shown, in %", 80.0)


def main(options: Options) -> None:
    plots = pyplot()
    lines = {label: curve(Path(path)) for path, label in map(_labelled, options.runs)}
    figure, axes = plots.subplots(figsize=(7, 4.5))
    for label, points in lines.items():
        seconds, accuracies, intervals = zip(*points)
        axes.errorbar(seconds, accuracies, yerr=intervals, label=label, capsize=2, marker="o", markersize=3)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("validation accuracy in %, ± 95 % interval")
    axes.set_ylim(options.floor, 100)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.tight_layout()
    figure.savefig(options.out, dpi=150)
    plots.close(figure)
    print(f"saved {options.out}")


def curve(run: Path) -> list[tuple[float, float, float]]:
    """(seconds, accuracy, interval) of each validation, in %."""
    path = run / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()]
        points = [
            (r["seconds"], 100 * r["validation"], 100 * r["interval"]) for r in records if "validation" in r
        ]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected the metrics of a run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no metrics of a run ({error!r})") from None
    if not points:
        raise InputError(f"{path} holds no validation; train with --validate-every N")
    return points


def _labelled(text: str) -> tuple[str, str]:
    path, _, label = text.partition(":")
    return path, label or Path(path).name


def pyplot():
    """matplotlib, drawing into files."""
    try:
        import matplotlib
    except ImportError:
        raise InputError('no matplotlib, which draws the plot; pip install "fomaml[plots]"') from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


if __name__ == "__main__":
    with told_in_one_line():
        main(parse(Options))
