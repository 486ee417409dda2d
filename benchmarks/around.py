"""`python -m benchmarks.around [WORKLOAD ...]`: a step of `fomaml.train` beside the bare meta-gradient.

A step draws its tasks, computes their meta-gradient, checks that its numbers are finite, and takes the step of Adam.
Both sides take turns for so many rounds. More than 1 is what surrounds the meta-gradient.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from statistics import median

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.__main__ import CORES, _commit, _processor
from benchmarks.process import ROOT
from benchmarks.workloads import TINY, WORKLOADS, Workload, build, find
from fomaml import FOMAML, ClassSource, Episodes, RegressionEpisodes
from fomaml.data.synthetic import Sinusoids
from fomaml.engines import plan
from fomaml.episodes import TaskSequence
from fomaml.train import train

RESULTS = ROOT / "benchmarks" / "results" / "around.json"
CLASSES, EACH = 64, 40  # of the data that tasks are drawn from


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.around", description=__doc__)
    parser.add_argument(
        "workloads", nargs="*", metavar="WORKLOAD", help=f"{', '.join(WORKLOADS | TINY)}; default: A-G"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of a turn; default 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument(
        "--render", action="store_true", help="write the table of the results into docs/performance.md"
    )
    options = parser.parse_args(arguments)
    if options.render:
        render()
        return
    found = {}
    for name in options.workloads or WORKLOADS:
        found[name] = beside(name, options.rounds, options.turn, options.seed, not options.eager)
        print(name, _row(name, found[name]), flush=True)
    result = {
        "cores": CORES, "threads": torch.get_num_threads(), "processor": _processor(), "torch": torch.__version__,
        "python": platform.python_version(), "commit": _commit(), "date": date.today().isoformat(),
        "seed": options.seed, "compiled": not options.eager, "workloads": found,
    }  # fmt: skip
    if set(found) == set(WORKLOADS):
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def episodes_of(workload: Workload, seed: int) -> TaskSequence:
    """Tasks of a workload's sizes, drawn from data in memory."""
    if workload.ways is None:
        return RegressionEpisodes(Sinusoids(), shots=workload.support, query_shots=workload.query, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = torch.randn(CLASSES * EACH, *workload.example)
    source = ClassSource(inputs, torch.arange(CLASSES).repeat_interleave(EACH))
    shots, query = workload.support // workload.ways, workload.query // workload.ways
    return Episodes(source, ways=workload.ways, shots=shots, query_shots=query, seed=seed)


def beside(name: str, rounds: int, turn: float, seed: int, compile: bool) -> dict:
    """The milliseconds of both, by round, and the median of the ratios."""
    workload, setup = find(name), build(find(name), torch.float32, seed)
    model = setup.own_model() if workload.own else setup.model
    learner = FOMAML(model, workload.inner_lr, workload.steps, setup.criterion)
    episodes = episodes_of(workload, seed)
    tasks = episodes.batch(0, workload.tasks)
    own = plan(learner, tasks, compile=compile)
    records = train(
        learner, episodes, torch.optim.Adam(learner.parameters(), lr=1e-6), iterations=10**9,
        meta_batch_size=workload.tasks, plan=own,
    )  # fmt: skip
    sides: dict[str, Callable[[], Tensor]] = {
        "bare": lambda: own(tasks).query_losses,
        "step": lambda: next(records).meta_loss,
    }
    number = {}
    for side, run in sides.items():
        run()  # compiles
        run()
        number[side] = max(1, int(turn / _seconds(run, 3)))
    milliseconds = {side: [] for side in sides}
    for _, (side, run) in itertools.product(range(rounds), sides.items()):
        milliseconds[side].append(1e3 * _seconds(run, number[side]))
    ratios = [step / bare for step, bare in zip(milliseconds["step"], milliseconds["bare"])]
    return {"engine": own.engine, "milliseconds": milliseconds, "ratio": median(ratios)}


def _seconds(run: Callable[[], Tensor], number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        run().sum().item()  # waits for the device
    return (time.perf_counter() - start) / number


def _row(name: str, facts: dict) -> str:
    bare, step = (median(facts["milliseconds"][side]) for side in ("bare", "step"))
    return f"| {name} | {bare:.3g} | {step:.3g} | {facts['ratio']:.2f} |"


def render() -> None:
    """Write the table of the results into the page."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = ROOT / "docs" / "performance.md"
    head = "| workload | meta-gradient, ms | step of `train`, ms | ratio |\n|---|---|---|---|"
    rows = [_row(name, facts) for name, facts in results["workloads"].items()]
    origin = report.origin(results, results["seed"])
    report.put("\n".join([f"{origin}.", "", head, *rows]), page, "around")


if __name__ == "__main__":
    main()
