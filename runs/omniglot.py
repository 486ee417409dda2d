"""The Omniglot rows of docs/results.md: train a preset, judge it by every protocol, and keep what is small of it.

python runs/omniglot.py fomaml-omniglot-5w1s-short --data-root my/omniglot
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fomaml.app import cli
from fomaml.app.judge import evaluate_run, told
from fomaml.app.parser import option, parse, positional
from fomaml.app.presets import PRESETS
from fomaml.app.report import align
from fomaml.app.rundir import circumstances, load_run, load_settings, weights_file
from fomaml.app.settings import Settings, to_json
from fomaml.errors import InputError
from fomaml.files import write_text

HERE = Path(__file__).resolve().parent
MANY = 15  # query images per class, beside the number that the published figure has
FILES = ("result.json", "result.txt", "metrics.jsonl")


@dataclass(frozen=True)
class Row:
    """What a row needs beside its preset.

    also: further tasks to judge the same weights on, such as 5w1s. weights: best by validation, or last.
    copies, turned, balanced: further protocols, each judged with the inner steps of training: so many copies of each
    image; each class of a task turned at random, as in MAML's figures; query sets assumed to be balanced.
    options: of `fomaml train`, on how to compute, not what.
    """

    also: tuple[str, ...] = ()
    weights: str = "best"
    copies: int = 1
    turned: bool = False
    balanced: bool = False
    options: tuple[str, ...] = ("--compile", "yes")


ROWS = {name: Row() for name, preset in PRESETS.items() if preset.settings["source"] == "omniglot"} | {
    "fomaml-omniglot-20w1s-short": Row(also=("20w5s",)),
    "maml-omniglot-20w1s-short": Row(also=("20w5s",)),
    # As published, the last weights: the step size has come down to zero by then.
    "reptile-omniglot-5w1s-short": Row(also=("5w5s",), weights="last"),
    # The last weights: the step size is zero by then, and 300 validation tasks cannot tell them from the best ones.
    "best-omniglot": Row(
        also=("5w1s", "5w5s", "20w5s"),
        weights="last",
        copies=8,
        turned=True,
        balanced=True,
        options=("--autocast", "auto"),
    ),
}


@dataclass(frozen=True)
class Options:
    """Train one row, or go on with a run that was killed, judge it, keep it under docs/results/ and renew the tables.

    A finished run is judged again without training.
    """

    name: str | None = positional(
        "the row, which is the name of its preset; see --list", None, metavar="NAME"
    )
    show: bool = option("list the rows and stop", False, name="list")
    data_root: Path | None = option(
        "the folder of Omniglot's archives; default: the user's cache, or a download"
    )
    out: Path = option("where run directories go", Path("out"))
    threads: int = option("the number of threads", 1)
    tasks: int = option("the number of test tasks of each protocol", 1000)
    seed: int = option("the seed of the test tasks, which are not those of the run's own result", 1)


def main(options: Options) -> None:
    if options.show:
        print(listing())
        return
    if options.name is None:
        raise InputError("give the name of a row, or --list for all of them")
    if options.name not in ROWS:
        raise InputError(f"unknown row {options.name!r}; there are: {', '.join(ROWS)}")
    torch.set_num_threads(options.threads)
    run = train(options)
    keep(run, HERE.parent / "docs" / "results" / folder(options.name), ROWS[options.name], options)
    subprocess.run([sys.executable, HERE / "omniglot_table.py"], check=True)


def listing() -> str:
    lines = [["row", "aims at, %", "also judged on", "what it is"]]
    lines += [
        [name, PRESETS[name].aim, " ".join(row.also), PRESETS[name].summary] for name, row in ROWS.items()
    ]
    return align(lines, left=True)


def folder(name: str) -> str:
    """The name of the folder under docs/results/ that keeps a row: omniglot_fomaml_5w1s for fomaml-omniglot-5w1s."""
    algorithm, _, *rest = name.split("-")
    return "_".join(["omniglot", algorithm, *rest])


def train(options: Options) -> Path:
    """The finished run directory of a row: trained, or gone on with, or found as it is."""
    run = options.out / folder(options.name)
    root = [] if options.data_root is None else ["--data-root", str(options.data_root)]
    if not (run / "config.json").exists():
        row = ["--preset", options.name, "--no-baselines", *ROWS[options.name].options]
        cli.main(["train", *row, "--out", str(run), *root])
    elif not (run / "result.json").exists():
        cli.main(["train", "--resume", str(run)])
    return run


def keep(run: Path, to: Path, row: Row, options: Options) -> None:
    """Judge a finished run with K and 15 query images per class and copy it without the paths of this machine.

    Each protocol is judged by the run's own batch statistics and by those of the support set, and with the query image
    where the published figure was.
    """
    if missing := [name for name in (*FILES, "weights.safetensors") if not (run / name).exists()]:
        raise InputError(f"{run} has no {missing[0]}: is the run finished?")
    settings, here = load_settings(run), circumstances()  # before anything is written: of a clean tree
    evaluations = [
        judged(run, row.weights, options, **changes) for changes in protocols(row, settings, options.tasks)
    ]
    to.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(run / name, to / name)
    shutil.copyfile(weights_file(run, row.weights), to / "weights.safetensors")
    write_text(to / "config.json", to_json(dataclasses.replace(settings, data_root=None, out=None)))
    facts = {"seed": options.seed, "weights": row.weights, **here, "evaluations": evaluations}
    write_text(to / "evaluations.json", json.dumps(facts, indent=2) + "\n")


def protocols(row: Row, settings: Settings, tasks: int) -> list[dict]:
    """What each evaluation changes of the run's settings, and `balanced`."""
    queries_of = {(settings.ways, settings.shots): (settings.test_query_shots, 1, MANY)}
    for name in row.also:
        ways, shots = map(int, name.removesuffix("s").split("w"))
        queries_of[ways, shots] = (*queries_of.get((ways, shots), ()), shots, MANY)
    turned = {"test_augment": "turns"} if row.turned else {}
    further = []
    if row.copies > 1:
        further.append({"test_copies": row.copies})
    if turned:
        further.append(turned)
    if row.balanced:
        further.append(turned | {"balanced": True})
    changes = []
    for (ways, shots), queries in queries_of.items():
        task = {"ways": ways, "shots": shots, "test_tasks": tasks}
        changes += [task | {"test_query_shots": query} for query in dict.fromkeys(queries)]
        task |= {"test_query_shots": queries[0], "test_steps": (settings.inner_steps,)}
        changes += [task | each for each in further]
    return changes


def judged(run: Path, weights: str, options: Options, balanced: bool = False, **changes) -> dict:
    """The result of one evaluation, which is also printed."""
    settings, learner = load_run(run, weights, data_root=options.data_root, **changes)
    preset = PRESETS.get(settings.preset)
    with_query = preset and preset.statistics == "with-query" and changes["test_query_shots"] != MANY
    statistics = ("own", "support", "with-query") if with_query else ("own", "support")
    result = evaluate_run(settings, learner, statistics, options.seed, balanced=balanced)
    for each in (result, *result["by_statistics"].values()):
        protocol = each["protocol"]
        choices = f", {protocol['copies']} copies" if protocol["copies"] > 1 else ""
        choices += ", turned" * (protocol["test_augment"] == "turns") + ", balanced" * protocol["balanced"]
        print(
            f"{protocol['ways']}-way {protocol['shots']}-shot, {protocol['query_shots']} query{choices}, "
            f"{told(protocol)}: {100 * each['accuracy']:.2f} ± {100 * each['interval']:.2f} %",
            flush=True,
        )
    return result


if __name__ == "__main__":
    with cli.told_in_one_line():
        main(parse(Options))
