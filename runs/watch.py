"""A new person on a smartwatch: seven exercises, one or five windows of two seconds of each, against baselines.

Two of the ten subjects are left out at a time. Every method is tuned on the subjects that are left, by leaving out two
more of them; the subjects left out first are judged once, with what was chosen. Finished parts are kept under --out, so
that a run that was killed goes on. Needs scikit-learn.

python runs/watch.py --data my/watch.npz
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from study import estimate
from torch import Tensor
from watch_methods import LEARNER, METHODS, TUNED, Cell
from watch_tasks import Recordings, UnseenTasks

from fomaml.app.cli import told_in_one_line
from fomaml.app.parser import option, parse
from fomaml.app.report import align
from fomaml.app.rundir import circumstances
from fomaml.errors import InputError
from fomaml.files import write_text

HERE = Path(__file__).resolve().parent
FOLDS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]  # subjects, from 0
SEEDS = (0, 1, 2)
SHOTS = (1, 5)


@dataclass(frozen=True)
class Options:
    """Tune and judge all methods on the smartwatch recordings, and write runs/watch/."""

    data: Path = option("the recordings, see runs/watch_download.py", Path("watch.npz"))
    out: Path = option("where finished parts are kept", Path("out/watch"))
    threads: int = option("the number of threads", 1)


Trial = tuple[str, int]  # a setting, and a number of steps


def by_subject(tasks: UnseenTasks, scores: Tensor) -> dict[str, float]:
    owners = torch.tensor(tasks.owners)
    return {str(who): scores[owners == who].mean().item() for who in dict.fromkeys(tasks.owners)}


def inner_cell(recordings: Recordings, fold: int) -> dict:
    """Every trial of every method, trained without a fold and the next, on the subjects of each of the two."""
    pair = fold, (fold + 1) % len(FOLDS)
    cell = Cell(recordings, FOLDS[pair[0]] + FOLDS[pair[1]], seed=0)
    found: dict = {}
    for shots in SHOTS:
        for own in pair:
            tasks = UnseenTasks(recordings, FOLDS[own], shots)
            for name, method in METHODS.items():
                for setting, score in method.settings.items():
                    for steps, scores in score(cell, tasks, method.steps).items():
                        place = found.setdefault(f"{shots}", {}).setdefault(f"{own}", {}).setdefault(name, [])
                        place.append([setting, steps, by_subject(tasks, scores)])
    return found


def chosen(inner: Mapping[int, dict], fold: int, shots: int, name: str) -> tuple[Trial, float]:
    """The trial with the best mean over the four validation subjects of a fold, and this mean.

    They are the subjects of the folds before and after, of networks that saw neither them nor the fold's own.
    """
    count = len(FOLDS)
    before, after = (fold - 1) % count, (fold + 1) % count
    lists = inner[before][f"{shots}"][f"{before}"][name], inner[fold][f"{shots}"][f"{after}"][name]
    means = [
        (float(np.mean([*a.values(), *b.values()])), (setting, steps))
        for (setting, steps, a), (_, _, b) in zip(*lists, strict=True)
    ]
    best, trial = max(means, key=lambda each: each[0])
    return trial, best


def final_cell(recordings: Recordings, inner: Mapping[int, dict], fold: int, seed: int) -> dict:
    """The chosen trial of each method, trained without a fold, on its subjects."""
    cell = Cell(recordings, FOLDS[fold], seed)
    found: dict = {}
    for shots in SHOTS:
        tasks = UnseenTasks(recordings, FOLDS[fold], shots)
        for name, method in METHODS.items():
            (setting, steps), _ = chosen(inner, fold, shots, name)
            scores = method.settings[setting](cell, tasks, (steps,))[steps]
            found.setdefault(f"{shots}", {})[name] = by_subject(tasks, scores)
    return found


def kept(path: Path, make: Callable[[], dict]) -> dict:
    """A finished part, or made and kept now."""
    if not path.exists():
        began = time.perf_counter()
        write_text(path, json.dumps(make()) + "\n")
        print(f"{path.stem}: {time.perf_counter() - began:.0f} s", flush=True)
    return json.loads(path.read_text())


def summary(inner: Mapping[int, dict], final: Mapping[tuple[int, int], dict], shots: int) -> dict:
    """By method: its mean over subjects, the mean difference of the learner from it, and what was chosen."""
    accuracies = {
        name: {
            subject: float(np.mean([final[fold, seed][f"{shots}"][name][f"{subject}"] for seed in SEEDS]))
            for fold, subjects in enumerate(FOLDS)
            for subject in subjects
        }
        for name in METHODS
    }
    ours = np.array(list(accuracies[LEARNER].values()))
    found = {}
    for name, method in METHODS.items():
        values = np.array(list(accuracies[name].values()))
        found[name] = {
            "accuracy": float(values.mean()),
            "interval": estimate(torch.from_numpy(values)).interval,
            "learner_minus_this": float((ours - values).mean()),
            "its_interval": estimate(torch.from_numpy(ours - values)).interval if name != LEARNER else 0.0,
            "trials": method.trials,
            "chosen_by_fold": [chosen(inner, fold, shots, name) for fold in range(len(FOLDS))],
            "by_subject": {subject + 1: value for subject, value in accuracies[name].items()},
            "by_seed": [
                float(
                    np.mean(
                        [
                            v
                            for fold in range(len(FOLDS))
                            for v in final[fold, seed][f"{shots}"][name].values()
                        ]
                    )
                )
                for seed in SEEDS
            ],
        }
    return found


def lines(results: Mapping[str, dict]) -> Iterator[str]:
    yield "Smartwatch exercises of a new person: accuracy in %, ten subjects, three training seeds."
    yield "± 95 % interval over the subjects (Student's t); differences are paired."
    yield ""
    headings = [text for shots in results for text in (f"{shots}-shot", f"{LEARNER} minus this")]
    rows = [["", *headings, "trials"]]
    for name, method in METHODS.items():
        row = [name]
        for found in results.values():
            row.append(f"{100 * found[name]['accuracy']:.1f} ± {100 * found[name]['interval']:.1f}")
            row.append("" if name == LEARNER else difference(found[name]))
        rows.append([*row, str(method.trials)])
    yield align(rows)
    yield ""
    for shots, found in results.items():
        gap, unsure = found[TUNED]["learner_minus_this"], found[TUNED]["its_interval"]
        verdict = "beats" if gap > unsure else "LOSES to" if gap < -unsure else "cannot be told from"
        yield f"{shots}-shot: {LEARNER} {verdict} {TUNED}, {difference(found[TUNED])} points"


def difference(row: Mapping) -> str:
    return f"{100 * row['learner_minus_this']:+.1f} ± {100 * row['its_interval']:.1f}"


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    if not options.data.exists():
        raise InputError(f"there is no {options.data}: runs/watch_download.py says how to get it")
    recordings, out = Recordings(options.data), options.out
    out.mkdir(parents=True, exist_ok=True)
    folds = range(len(FOLDS))
    inner = {fold: kept(out / f"inner{fold}.json", partial(inner_cell, recordings, fold)) for fold in folds}
    final = {
        (fold, seed): kept(
            out / f"final{fold}-{seed}.json", partial(final_cell, recordings, inner, fold, seed)
        )
        for seed in SEEDS
        for fold in folds
    }
    results = {f"{shots}": summary(inner, final, shots) for shots in SHOTS}
    text = "\n".join(lines(results)) + "\n"
    print(text)
    facts = {"command": "python runs/watch.py", **circumstances(), "seeds": SEEDS, "shots": results}
    (HERE / "watch").mkdir(exist_ok=True)
    write_text(HERE / "watch" / "watch.json", json.dumps(facts, indent=1) + "\n")
    write_text(HERE / "watch" / "watch.txt", text)


if __name__ == "__main__":
    with told_in_one_line():
        main(parse(Options))
