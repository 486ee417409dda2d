"""`python -m benchmarks.gpu`: all that needs a GPU, by one command.

The checks that need one, the workloads A-G beside the same peers with time, memory and the share of the practical peak,
and the constants of the rule in engines/gpu.py, as measured. It writes benchmarks/results/gpu.json and a section of
docs/benchmarks.md. `--device cpu --tiny` tries the command itself.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import by_hand, exactness, report
from benchmarks.__main__ import circumstances, write
from benchmarks.contestants import contestants
from benchmarks.gpu_checks import checked
from benchmarks.process import ROOT
from benchmarks.race import Options
from benchmarks.workloads import TINY, WORKLOADS, Setup, build, find
from fomaml.app.device import check_device, device_facts
from fomaml.engines import gpu as rule
from fomaml.engines import plan
from fomaml.learning.algorithms import FOMAML
from fomaml.tasks import Examples, Task

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"


def main() -> None:
    arguments = _parser().parse_args()
    device = check_device(arguments.device)
    names = arguments.workload or [*(TINY if arguments.tiny else WORKLOADS)]
    results = {
        "run": circumstances(Options(torch.get_num_threads(), seed=arguments.seed, rounds=arguments.rounds))
        | {"device": str(device), **device_facts(str(device))},
        "checks": checked(device),
        "workloads": {name: race(name, device, arguments) for name in names},
        "rule": measured_rule(device, arguments.tiny),
    }
    write(results, arguments.out)
    text = page(results)
    print(text)
    if not arguments.tiny and arguments.out == RESULTS:
        report.put(text, ROOT / "docs" / "benchmarks.md", "gpu")


# --- the race -------------------------------------------------------------------------------------


def race(name: str, device: torch.device, arguments: argparse.Namespace) -> dict:
    """The record of a workload: of each contestant the median over rounds in milliseconds, its peak memory in bytes
    beyond what it holds before, its error in float32, and the share of the GEMM peak that the plain loop's
    operations make in that time; or the reason why it did not take part.
    """
    workload = find(name)
    reference = exactness.reference(build(workload, torch.float64, arguments.seed))
    flops = _operations(build(workload, torch.float32, arguments.seed))
    rows: dict[str, dict] = {}
    runs: dict[str, Callable[[], object]] = {}
    for key, contestant in contestants(workload).items():
        if not any(fnmatchcase(key, glob) for glob in arguments.contestants):
            continue
        try:
            run, read = contestant.make(_moved(build(workload, torch.float32, arguments.seed), device))
            began = time.perf_counter()
            found = read(run())
            synchronise(device)
            row = {"ours": contestant.ours, "first_seconds": time.perf_counter() - began}
            row["error_float32"] = exactness.error([each.cpu() for each in found], reference)
            if not row["error_float32"] <= exactness.FLOAT32:
                raise ValueError(f"its gradient is off by {row['error_float32']:.2g}")
            rows[key], runs[key] = row, run
            row["memory"] = _peak(run, device)
        except Exception as error:  # of a peer that is not installed, or does not run here
            rows[key] = {"ours": contestant.ours, "reason": f"{type(error).__name__}: {str(error)[:200]}"}
    order = random.Random(arguments.seed)
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(arguments.rounds):
        for key in order.sample([*runs], len(runs)):
            times[key].append(seconds(runs[key], device, arguments.turn))
    peak = gemm(device, arguments.tiny)
    for key, own in times.items():
        median = statistics.median(own)
        rows[key] |= {"milliseconds": 1e3 * median, "of_gemm_peak": flops / median / peak}
    ours = [key for key in runs if rows[key]["ours"]]
    for key in runs if ours else ():
        best = min(ours, key=lambda each: rows[each]["milliseconds"])
        rows[key]["ratio"] = statistics.median(a / b for a, b in zip(times[key], times[best]))
    return {"title": workload.title, "flops": flops, "gemm_flops": peak, "contestants": rows}


def seconds(run: Callable[[], object], device: torch.device, least: float) -> float:
    """Of one run, to the end of what the device has to do; the mean over a turn of at least so many seconds."""
    synchronise(device)
    number, began = 0, time.perf_counter()
    while not number or time.perf_counter() - began < least:
        run()
        synchronise(device)
        number += 1
    return (time.perf_counter() - began) / number


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def gemm(device: torch.device, tiny: bool) -> float:
    """The practical peak: operations a second of the best of some square matrix products in float32."""
    best = 0.0
    for size in (64,) if tiny else (1024, 4096, 8192):
        left, right = torch.randn(2, size, size, device=device)
        torch.mm(left, right)
        best = max(
            best, 2 * size**3 / seconds(lambda a=left, b=right: torch.mm(a, b), device, 0.0 if tiny else 0.5)
        )
    return best


def _operations(setup: Setup) -> int:
    run, _ = by_hand.loop(setup)
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _moved(setup: Setup, device: torch.device) -> Setup:
    return Setup(setup.workload, setup.model.to(device), setup.tasks.to(device))


def _peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes beyond those that are held before; None where the device does not tell."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


# --- the rule -------------------------------------------------------------------------------------


def measured_rule(device: torch.device, tiny: bool) -> dict[str, dict]:
    """The constants of engines/gpu.py: what stands there, and what is measured here."""
    turn = 0.0 if tiny else 0.5
    peak = gemm(device, tiny)
    small = torch.zeros(8, device=device)

    def launches() -> None:
        out = small
        for _ in range(1000):
            out = out + 1

    size, tasks = (8, 4) if tiny else (64, 32)
    a, b = torch.randn(2, tasks, size, size, device=device)
    products = 2 * tasks * size**3 / seconds(lambda: torch.bmm(a, b), device, turn)
    images = torch.randn(5, tasks * size, 14, 14, device=device)
    kernels = torch.randn(tasks * size, size, 3, 3, device=device)
    grouped = seconds(lambda: torch.conv2d(images, kernels, padding=1, groups=tasks), device, turn)
    convolutions = 2 * 5 * tasks * size * size * 9 * 14 * 14 / grouped
    return {
        "PEAK": {"stands": rule.PEAK.get(device.type), "measured": peak},
        "LAUNCH": {"stands": rule.LAUNCH[False], "measured": seconds(launches, device, turn) / 1000},
        "SHARE_OF_PRODUCTS": {"stands": rule.SHARE_OF_PRODUCTS, "measured": products / peak},
        "SHARE_OF_CONVOLUTIONS": {"stands": rule.SHARE_OF_CONVOLUTIONS, "measured": convolutions / peak},
        "FACTORED": {"stands": rule.FACTORED, "measured": _factored_from(device, tiny)},
    }


def _factored_from(device: torch.device, tiny: bool) -> int | None:
    """The fewest numbers in the wide weights of all tasks from which on the factored engine is the faster one."""
    tasks = 4 if tiny else 32
    for width in (16, 32) if tiny else (64, 128, 256, 512, 1024, 2048, 4096):
        model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5)).to(device)
        labels = (torch.arange(5) % 5).expand(tasks, 5)
        batch = Task(*(Examples(torch.randn(tasks, 5, width), labels) for _ in range(2))).to(device)
        took = {}
        for engine in ("batched", "factored"):
            own = plan(FOMAML(copy.deepcopy(model), 0.01, 5), batch, engine=engine)
            own(batch)
            took[engine] = seconds(partial(own, batch), device, 0.0 if tiny else 0.3)
        if took["factored"] < took["batched"]:
            return tasks * width * width
    return None


# --- the page -------------------------------------------------------------------------------------


def page(results: dict) -> str:
    """The record in words and tables."""
    run = results["run"]
    what = run.get("gpu", f"{run['device']} of {run['machine']}")
    tf32 = ", ".join(run.get("tf32", ())) or "nowhere"
    lines = [
        f"{what}, torch {run['torch']}, commit {run['commit']}, {run['date']}; float32, TF32: {tf32}.",
        "",
        "| check | | |",
        "|---|---|---|",
        *(
            f"| {name} | {'passed' if own['passed'] else '**failed**'} | {own['saw']} |"
            for name, own in results["checks"].items()
        ),
        "",
        "| constant of the rule | stands | measured |",
        "|---|---|---|",
        *(
            f"| {name} | {_number(own['stands'])} | {_number(own['measured'])} |"
            for name, own in results["rule"].items()
        ),
    ]
    for name, record in results["workloads"].items():
        rows = record["contestants"]
        lines += [
            "",
            f"### {name} on a GPU: {record['title']}",
            "",
            "| | ms | time / fastest here | of GEMM peak | peak memory | first call | error in float32 |",
            "|---|---|---|---|---|---|---|",
        ]
        for key in sorted((k for k in rows if "ratio" in rows[k]), key=lambda k: rows[k]["milliseconds"]):
            row = rows[key]
            memory = "" if row["memory"] is None else f"{row['memory'] / 2**20:.0f} MB"
            lines.append(
                f"| {key} | {row['milliseconds']:.3g} | {row['ratio']:.2f} | {row['of_gemm_peak']:.1%} | {memory} "
                f"| {row['first_seconds']:.1f} s | {row['error_float32']:.0e} |"
            )
        lines += ["", *(f"- {key}: {row['reason']}" for key, row in rows.items() if "reason" in row)]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("workload", nargs="*", help=f"{', '.join(WORKLOADS)} (default: all)")
    add("--device", default="cuda", help="cuda, cuda:1, mps; cpu to try the command")
    add("--tiny", action="store_true", help="tiny workloads, a moment each: to try the command")
    add("--contestants", nargs="+", default=["*"], metavar="GLOB", help="names of contestants to run")
    add("--rounds", type=int, default=7, help="interleaved rounds of timing")
    add("--turn", type=float, default=0.5, help="seconds, at least, of a contestant's turn in a round")
    add("--seed", type=int, default=0, help="of weights, tasks and the order of turns")
    add("--out", type=Path, default=RESULTS, help="the JSON")
    return parser


if __name__ == "__main__":
    main()
