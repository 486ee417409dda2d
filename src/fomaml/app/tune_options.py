"""The options of `fomaml tune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.commands import RunOptions
from fomaml.app.parser import option

TRIALS = 20


@dataclass(frozen=True)
class TuneOptions(RunOptions):
    """Search the step size, the number of steps and the meta step size on validation tasks.

    Each trial is a short training; the best settings are printed as the line that trains with them. What is given, as
    --inner-lr 0.1, is not searched. The baselines that have something to tune get as many trials on the same tasks. The
    folder has every trial in trials.jsonl, and the best of each method in best.json.

    Example: fomaml tune omniglot --trials 20 --trial-iterations 300 --out out/tuned
    Example: fomaml tune table:my/machines.csv --task machine --target wear --order hour
    """

    algorithm: str | None = option("the algorithm (default: fomaml)", choices=tuple(ALGORITHMS))
    preset: str | None = option("a published setting, see `fomaml presets`; any option beside it wins")
    trials: int | None = option(f"the number of trials of each method (default: {TRIALS})")
    trial_iterations: int | None = option(
        "the outer steps of each trial (default: a tenth of --iterations, which are those of the line at the end)"
    )
    inner_lr_range: tuple[float, float] | None = option(
        "the step sizes to search, by their logarithm (default: a tenth to ten times the one without a search)",
        metavar="X",
    )
    inner_steps_range: tuple[int, int] | None = option(
        "the numbers of steps to search (default: 1 to twice the one without a search, at least 5)"
    )
    meta_lr_range: tuple[float, float] | None = option(
        "the meta step sizes to search (default: a tenth to ten times the one without a search)", metavar="X"
    )
    search_seed: int | None = option("the seed of the search (default: as --seed)")
    resume: Path | None = option(
        "go on with this folder after it was interrupted; no other option goes with it, but more --trials, and "
        "--model, --loss and --metric again where they are your own code"
    )
    accept_changed_code: bool = option(
        "with --resume: go on with code of your own that is not what the search began with", False
    )
