"""The MNIST table of docs/results.md: two questions, 1 and 5 shots, beside baselines. `make train` runs it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import get_args

from fomaml.app.cli import log_shown, told_in_one_line
from fomaml.app.judge import told
from fomaml.app.parser import option, parse
from fomaml.app.progress import watching
from fomaml.app.report import duration, table, verdict
from fomaml.app.rundir import circumstances, claimed
from fomaml.app.session import train_run
from fomaml.app.settings import Question
from fomaml.app.settle import settle
from fomaml.files import write_text


@dataclass(frozen=True)
class Options:
    """Train FOMAML four times on MNIST and print one table, with baselines on the same unseen tasks."""

    data_root: Path | None = option(
        "a folder that holds MNIST/raw/*-ubyte; default: torchvision's download, or MNIST-5k without a network"
    )
    out: Path | None = option(
        "where the four run directories and the table go; default: a new folder under out/"
    )
    model: str = option("mlp (784-256-10; default), conv4 or conv4-strided", "mlp")
    test_tasks: int = option("the number of unseen tasks (default: 1000)", 1000)
    seed: int = option("the seed of weights and tasks (default: 0)", 0)
    device: str = option("cpu (default), cuda, cuda:N or mps", "cpu")


def main(options: Options) -> None:
    out = options.out or Path("out") / f"mnist-{datetime.now():%Y%m%d-%H%M%S}"
    with claimed(out):
        train_all(options, out)


def train_all(options: Options, out: Path) -> None:
    """The four runs and the table, in a folder that is there."""
    began = time.perf_counter()
    columns = []
    shared = {k: v for k, v in vars(options).items() if k != "out"}
    for question in get_args(Question):
        for shots in (1, 5):
            print(f"\n── {question}, {shots}-shot")
            config = settle(source="mnist", question=question, shots=shots, **shared)
            with watching(config, sys.stdout) as watch:
                run = out / f"{question}-{shots}shot"
                result = train_run(config, run, say=watch.say, watch=watch, work=watch.work)
            columns.append((f"{question.replace('-', ' ')}, {shots}-shot", result))
    seconds = time.perf_counter() - began
    protocol, tasks = columns[0][1]["protocol"], columns[0][1]["tasks"]
    lines = [
        f"FOMAML on {protocol['data']}, 5-way, {tasks} unseen tasks, {told(protocol)}, "
        "the same tasks for every row of a column",
        "",
        table(columns),
        "",
        *(f"{heading}: {verdict(result)}" for heading, result in columns),
        "",
        f"{duration(seconds)} in all; run directories in {out}",
    ]
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    facts = {
        "command": " ".join(["python", "runs/mnist.py", *sys.argv[1:]]),
        **circumstances(),
        "seed": options.seed,
        "seconds": round(seconds),
        "columns": dict(columns),
    }
    write_text(out / "table.json", json.dumps(facts, indent=2) + "\n")
    write_text(out / "table.txt", text)


if __name__ == "__main__":
    with told_in_one_line(), log_shown():
        main(parse(Options))
