"""The weights of a new chick from those of its first days, by the command line alone: the table of docs/results.md.

python -m runs.chicks FOLDER/chick-weights.csv

Five folds of ten chicks. In each, `fomaml tune` searches each learner's settings on the chicks of the next fold, and
`fomaml train` trains with the best, three seeds, and tunes the baselines on the same chicks.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fomaml.app.cli import told_in_one_line
from fomaml.app.parser import option, parse, positional
from fomaml.errors import InputError
from runs.study import ROOT, estimate, keep, table, verdict

OUT = ROOT / "runs" / "chicks"
CHICKS, FOLDS, SEEDS = range(1, 51), range(5), range(3)
TASK = (
    "--task chick --target weight --order time --shots 5 --query-shots 5 --query-all --skip-small-groups "
    "--metric rmse"
)
LEARNERS = {"FOMAML": "fomaml", "MAML": "maml"}
# the support sets of training: as in the test, or weighings in a row from a random one on
DRAWS = "first", "anytime"
TRIALS = 10  # of a learner with each of DRAWS; each baseline has as many as both together


@dataclass(frozen=True)
class Options:
    """Weights of the first five weighings, days 0 to 8, to all later ones, for a chick that training has not seen."""

    table: Path = positional("the csv of weights: columns weight, time, chick, diet", metavar="TABLE")
    iterations: int = option("outer steps of each training", 1000)
    trial_iterations: int = option("outer steps of each trial", 250)
    work: Path = option("where runs go; what is there already is not run again", ROOT / "out" / "chicks")


def fomaml(command: list[str], out: Path, done: str) -> Path:
    """The folder of a command's output; run unless it holds the file that a finished one has."""
    if not (out / done).exists():
        print(f"fomaml {shlex.join(command)} --out {out}", flush=True)
        subprocess.run([sys.executable, "-m", "fomaml", *command, "--out", str(out)], check=True)
    return out


def of_fold(fold: int) -> list[str]:
    """Chick n is in fold n % 5; the next fold's chicks are for validation."""
    test = [str(chick) for chick in CHICKS if chick % 5 == fold]
    validation = [str(chick) for chick in CHICKS if chick % 5 == (fold + 1) % 5]
    return ["--test-keys", *test, "--validation-keys", *validation]


def trained(options: Options, learner: str, fold: int, seed: int) -> tuple[dict, str]:
    """result.json of a training with the best settings of the fold's searches, and these settings."""
    source = [f"table:{options.table}", *TASK.split(), *of_fold(fold), "--algorithm", LEARNERS[learner]]
    trials = ["--trials", str(TRIALS), "--trial-iterations", str(options.trial_iterations), "--no-baselines"]
    found = {}
    for draw in DRAWS:
        out = options.work / f"{learner}-fold{fold}-tune-{draw}"
        searched = fomaml(["tune", *source, "--train-draw", draw, *trials], out, "best.json")
        facts = json.loads((searched / "best.json").read_text(encoding="utf-8"))
        [method] = facts["methods"].values()
        found[draw] = method["score"], facts["settings"]
    draw = min(found, key=lambda draw: found[draw][0])
    best = found[draw][1]
    own = ["--train-draw", draw, "--test-steps", *map(str, best["test_steps"])]
    for name in ("inner_lr", "inner_steps", "meta_lr"):
        own += [f"--{name.replace('_', '-')}", str(best[name])]
    # the baselines stand beside the first learner only
    beside = "--baselines" if learner == next(iter(LEARNERS)) else "--no-baselines"
    command = ["train", *source, *own, beside, "--baseline-size", "full", "--seed", str(seed)]
    command += ["--iterations", str(options.iterations)]
    run = fomaml(command, options.work / f"{learner}-fold{fold}-seed{seed}", "result.json")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    if "unfinished" in result:
        raise InputError(f"{run} was killed in its baselines: fomaml train --resume {run}")
    return result, f"{draw} {best['inner_lr']:g} {best['inner_steps']} {best['meta_lr']:g} {result['steps']}"


def main(options: Options) -> None:
    found: dict[str, dict[str, list[float]]] = {}  # by method and chick the scores of the seeds
    settings: dict[str, list[str]] = {}
    for learner in LEARNERS:
        for fold in FOLDS:
            for seed in SEEDS:
                result, own = trained(options, learner, fold, seed)
                if not seed:
                    settings.setdefault(learner, []).append(own)
                for row in result["rows"]:
                    of_learner = row["label"].startswith(f"{result['name']}, ")
                    if of_learner and row["steps"] != result["steps"]:
                        continue
                    for chick, score in row["by_group"].items():
                        of_chicks = found.setdefault(learner if of_learner else row["label"], {})
                        of_chicks.setdefault(chick, []).append(score)
    chicks = sorted(next(iter(found.values())), key=int)
    means = {
        name: torch.tensor([of_chicks[chick] for chick in chicks], dtype=torch.float64).mean(1)
        for name, of_chicks in found.items()
    }
    heads = [f"RMSE in grams, {len(chicks)} chicks", "", *(f"{learner} minus this" for learner in LEARNERS)]
    rows = []
    for name, own in means.items():
        row = [name, estimate(own).text()]
        for learner in LEARNERS:
            difference = estimate(means[learner] - own)
            row.append("" if name == learner else f"{difference.text(1, '+')} {verdict(difference, -1)}")
        rows.append(row)
    facts = {
        "command": f"python -m runs.chicks {options.table.name}", "chicks": chicks, "seeds": len(SEEDS),
        "trials": TRIALS * len(DRAWS), "iterations": options.iterations, "trial iterations": options.trial_iterations,
        "train_draw, inner_lr, inner_steps, meta_lr and test steps by fold": settings,
        "by chick": {name: own.tolist() for name, own in means.items()},
    }  # fmt: skip
    keep(OUT, table(heads, rows), facts)


if __name__ == "__main__":
    with told_in_one_line():
        main(parse(Options))
