"""The options of the commands that look at a run: `fomaml report` and `fomaml show`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fomaml.app.parser import option, positional
from fomaml.app.serve_options import CHANGED, DEVICE, OWN_MODEL
from fomaml.app.settings import Better, Weights

RUN = "the directory of a run; one that still trains is shown as far as it is"


@dataclass(frozen=True)
class ReportOptions:
    """Write a page of a run: what it learned, some test tasks before and after adaptation, and how to repeat it.

    Of a folder that `fomaml compare` has written: its methods beside each other.

    The page, report.html, needs no network and no other file; each plot stands beside it as PNG and SVG. The tasks are
    drawn anew from the run's data. Without the data, or the weights, the page says what is left out, and why.

    Example: fomaml report out/digits
    Example: fomaml report out/comparison
    Example: fomaml report docs/results/omniglot_best --data-root my/omniglot --out out/omniglot
    """

    run: Path = positional(f"{RUN}; or the folder of a comparison", metavar="RUN")
    out: Path | None = option("the folder to write; default: RUN/report")
    tasks: int | None = option("the test tasks to look at (default: those of the run's test, at most 200)")
    shown: int = option(
        "the tasks that are shown with their examples: the first ones and the worst (default: 3)", 3
    )
    weights: Weights = option("best by validation (default), or last", "best")
    data_root: Path | None = option("where the run's data are by now")
    model: str | None = option(OWN_MODEL)
    loss: str | None = option("the loss again, where it is code of your own")
    metric: tuple[str, ...] | None = option("the metrics again, where they are code of your own")
    metric_direction: Better | None = option("as in `fomaml train`")
    accept_changed_code: bool = option(CHANGED, False)
    device: str | None = option(DEVICE)


@dataclass(frozen=True)
class ShowRunOptions:
    """Print the result of a run and its curves, also while it trains.

    Example: fomaml show out/digits
    Example: fomaml show out/digits --png out/plots
    """

    run: Path = positional(RUN, metavar="RUN")
    png: Path | None = option(
        "draw the curves into this folder, as PNG and SVG (fomaml[plots])", metavar="FOLDER"
    )
