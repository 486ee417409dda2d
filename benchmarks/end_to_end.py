"""`python -m benchmarks.end_to_end --mnist DATA --omniglot DATA`: whole jobs, from a shell to a tested model.

`fomaml train` with its defaults and a plain PyTorch script (benchmarks/plain.py) do the same job in turns: read the
data, meta-train, test on unseen tasks. Both start with caches that are warm: the images decoded, what is compiled on
disk. Each round has a seed of its own, from 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks import report
from benchmarks.process import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "end_to_end.json"


@dataclass(frozen=True)
class Job:
    """A job of both: what is trained how long, and tested. test_steps are the inner steps of the training."""

    title: str
    source: str
    options: tuple[str, ...]
    iterations: int
    query_shots: int
    inner_lr: float
    inner_steps: int
    meta_lr: float
    meta_batch_size: int = 16
    ways: int = 5
    shots: int = 1
    test_tasks: int = 500


JOBS = {
    "mnist": Job(
        "MNIST digits under new labels, MLP 784-256-10", "mnist", ("--question", "new-labels"),
        iterations=500, query_shots=10, inner_lr=0.05, inner_steps=5, meta_lr=0.005,
    ),
    "omniglot": Job(
        "Omniglot, strided net of 64 channels", "omniglot", (),
        iterations=500, query_shots=5, inner_lr=0.4, inner_steps=3, meta_lr=0.002,
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    for name in JOBS:
        parser.add_argument(
            f"--{name}", type=Path, metavar="DATA", help="the folder of its data, see --data-root"
        )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--render", action="store_true", help="write the table of the results into docs/performance.md"
    )
    options = parser.parse_args(arguments)
    if options.render:
        render()
        return
    from benchmarks.__main__ import CORES, _commit, _processor

    jobs = json.loads(RESULTS.read_text(encoding="utf-8"))["jobs"] if RESULTS.exists() else {}
    for name in JOBS:
        if (data := getattr(options, name)) is not None:
            run = {
                "cores": CORES, "processor": _processor(), "torch": torch.__version__, "commit": _commit(),
                "date": date.today().isoformat(),
            }  # fmt: skip
            jobs[name] = beside(name, data.resolve(), options.rounds) | {"run": run}
            print(_row(name, jobs[name]), flush=True)
    RESULTS.write_text(json.dumps({"jobs": jobs}, indent=1) + "\n", encoding="utf-8")


def beside(name: str, data: Path, rounds: int) -> dict:
    """The seconds of both and the accuracies that they reached, by round after one that warms up."""
    found: dict = {"title": JOBS[name].title}
    found |= {side: {"seconds": [], "accuracies": []} for side in ("fomaml", "plain")}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            seed, out, images = max(0, turn - 1), Path(folder) / str(turn), Path(folder) / "images.npy"
            runs = {
                "fomaml": partial(_by_fomaml, JOBS[name], data, out, seed),
                "plain": partial(_by_plain, name, data, images, seed),
            }
            for side, run in runs.items():
                begin = time.perf_counter()
                reached = run()
                if turn:
                    found[side]["seconds"].append(time.perf_counter() - begin)
                    found[side]["accuracies"].append(reached)
    return found


def _by_fomaml(job: Job, data: Path, out: Path, seed: int) -> float:
    words = {
        "--data-root": data, "--out": out, "--iterations": job.iterations, "--ways": job.ways, "--shots": job.shots,
        "--query-shots": job.query_shots, "--inner-lr": job.inner_lr, "--inner-steps": job.inner_steps,
        "--meta-lr": job.meta_lr, "--meta-batch-size": job.meta_batch_size, "--test-tasks": job.test_tasks,
        "--test-steps": job.inner_steps, "--validate-every": 0, "--statistics": "own", "--schedule": "constant",
        "--seed": seed,
    }  # fmt: skip
    pairs = [str(word) for pair in words.items() for word in pair]
    _run("fomaml", "train", job.source, *job.options, *pairs, "--no-baselines")
    return json.loads((out / "result.json").read_text(encoding="utf-8"))["accuracy"]


def _by_plain(name: str, data: Path, kept: Path, seed: int) -> float:
    words = name, str(data), str(kept), str(seed)
    return json.loads(_run("benchmarks.plain", *words).splitlines()[-1])["accuracy"]


def _run(*words: str) -> str:
    source = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": source}
    return subprocess.run(
        [sys.executable, "-m", *words], check=True, capture_output=True, text=True, env=environment, cwd=ROOT
    ).stdout


def _row(name: str, facts: dict) -> str:
    own, plain = facts["fomaml"], facts["plain"]
    ratio = report.median_ratio(plain["seconds"], own["seconds"])
    cells = [", ".join(f"{100 * each:.1f}" for each in side["accuracies"]) for side in (own, plain)]
    times = [f"{median(each['seconds']):.0f}" for each in (own, plain)]
    job = f"{JOBS[name].title}, {JOBS[name].iterations} iterations"
    return f"| {job} | {times[0]} | {times[1]} | **{ratio:.1f}** | {' | '.join(cells)} |"


def render() -> None:
    """Write the table of the results into the page."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = ROOT / "docs" / "performance.md"
    head = (
        "| job | `fomaml train`, s | plain, s | times faster | accuracy in %, by seed | of the plain script |\n"
        "|---|---|---|---|---|---|"
    )
    runs = {json.dumps(facts["run"]): facts["run"] for facts in results["jobs"].values()}
    origin = "\n".join(f"{report.origin(run, seed=0)} and following." for run in runs.values())
    rows = [_row(name, facts) for name, facts in results["jobs"].items()]
    report.put("\n".join([origin, "", head, *rows]), page, "end to end")


if __name__ == "__main__":
    main()
