"""`python -m benchmarks.first_call [WORKLOAD ...]`: seconds of the first compiled call, in fresh processes.

The first process starts with empty caches, the second finds what that one has left. The import of the library and
the data are not in the time. Medians over rounds; in each round every workload has its turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

import torch

from benchmarks import report
from benchmarks.__main__ import CORES, _commit, _processor
from benchmarks.process import ROOT
from benchmarks.workloads import TINY, WORKLOADS, build, find
from fomaml import FOMAML
from fomaml.engines import plan

RESULTS = ROOT / "benchmarks" / "results" / "first_call.json"
PROCESSES = ("first", "second")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_call", description=__doc__)
    parser.add_argument(
        "workloads", nargs="*", metavar="WORKLOAD", help=f"{', '.join(WORKLOADS | TINY)}; default: A-G"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=CORES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--beside", type=Path, help="the src folder of another version, in turns with this one"
    )
    parser.add_argument(
        "--render", action="store_true", help="write the table of the results into docs/performance.md"
    )
    parser.add_argument("--here", action="store_true", help="one call in this process, its seconds as JSON")
    options = parser.parse_args(arguments)
    if options.render:
        render()
    elif options.here:
        print(json.dumps(call(options.workloads[0], options.threads, options.seed)))
    else:
        measure(options)


def call(name: str, threads: int, seed: int) -> float:
    """Seconds of a first call here."""
    torch.set_num_threads(threads)
    workload, setup = find(name), build(find(name), torch.float32, seed)
    model = setup.own_model() if workload.own else setup.model
    learner = FOMAML(model, workload.inner_lr, workload.steps, setup.criterion)
    began = time.perf_counter()
    plan(learner, setup.tasks, compile=True)(setup.tasks)
    return time.perf_counter() - began


def measure(options: argparse.Namespace) -> None:
    sources = {"here": ROOT / "src"} | ({"beside": options.beside} if options.beside else {})
    names = options.workloads or list(WORKLOADS)
    seconds = {name: {side: {which: [] for which in PROCESSES} for side in sources} for name in names}
    for _ in range(options.rounds):
        for name in names:
            for side, source in sources.items():
                with tempfile.TemporaryDirectory() as cache:
                    for which in PROCESSES:
                        seconds[name][side][which].append(_in_a_process(name, source, Path(cache), options))
            print(name, _row(name, seconds[name]), flush=True)
    result = {
        "cores": CORES, "threads": options.threads, "processor": _processor(), "torch": torch.__version__,
        "python": platform.python_version(), "commit": _commit(), "date": date.today().isoformat(),
        "seed": options.seed, "seconds": seconds,
    }  # fmt: skip
    if set(names) == set(WORKLOADS):
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _in_a_process(name: str, source: Path, cache: Path, options: argparse.Namespace) -> float:
    environment = os.environ | {
        "PYTHONPATH": str(source.resolve()),
        "OMP_NUM_THREADS": str(options.threads),
        "XDG_CACHE_HOME": str(cache / "own"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
    }
    settings = ["--threads", str(options.threads), "--seed", str(options.seed)]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.first_call", "--here", name, *settings]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _row(name: str, sides: dict) -> str:
    cells = [f"{median(own[which]):.2g}" for own in sides.values() for which in PROCESSES]
    return f"| {name} | {' | '.join(cells)} |"


def render(page: Path = ROOT / "docs" / "performance.md") -> None:
    """Write the table of the results into the page."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    sides = next(iter(results["seconds"].values()))
    heads = {"here": "", "beside": " before"}
    titles = [f"{which} process{heads[side]}, s" for side in sides for which in PROCESSES]
    rows = [_row(name, own) for name, own in results["seconds"].items()]
    lines = [f"| workload | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|", *rows]
    origin = report.origin(results, results["seed"])
    report.put("\n".join([f"{origin}.", "", *lines]), page, "first call")


if __name__ == "__main__":
    main()
