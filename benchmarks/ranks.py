"""`python -m benchmarks.ranks [WORKLOAD ...]`: one process on all threads beside as many processes on one thread each.

Per workload: the seconds of an outer step of both, in turns; the bytes of the meta-gradient; and the seconds that
all_reduce takes for messages of several sizes, between these processes on this machine. The page's reckoning for more
workers is made of these by `reckoned`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from statistics import median

import torch
from torch import distributed, multiprocessing

from benchmarks import report
from benchmarks.__main__ import CORES, _commit, _processor
from benchmarks.process import ROOT
from benchmarks.workloads import TINY, WORKLOADS, build, find
from fomaml import FOMAML
from fomaml.tasks import Task
from fomaml.train import train

RESULTS = ROOT / "benchmarks" / "results" / "ranks.json"
SIZES = tuple(4**power for power in range(5, 13))  # bytes, 1 kB to 16 MB
WORKERS = (8, 64, 1024)
# seconds of a message, bytes a second: what is written on the box of a network, to be put in the place of what was
# measured between two processes of one machine
NETWORKS = {"10 Gbit/s Ethernet": (30e-6, 1.25e9), "200 Gbit/s InfiniBand": (3e-6, 25e9)}


class Fixed:
    """The tasks of a workload, over and over again."""

    def __init__(self, tasks: Task):
        self.tasks = tasks

    def batch(self, start: int, tasks: int) -> Task:
        number = len(self.tasks.support.targets)
        rows = [index % number for index in range(start, start + tasks)]
        return self.tasks.map(lambda tensor: tensor[rows])


def steps(name: str, seed: int, group) -> Callable[[int], float]:
    """A function that takes so many outer steps and says how many seconds each took."""
    workload, setup = find(name), build(find(name), torch.float32, seed)
    model = setup.own_model() if workload.own else setup.model
    learner = FOMAML(model, workload.inner_lr, workload.steps, setup.criterion)
    records = iter(
        train(
            learner, Fixed(setup.tasks), torch.optim.Adam(learner.parameters(), lr=1e-4), iterations=10**9,
            meta_batch_size=workload.tasks, measure_every=10**9, group=group,
        )
    )  # fmt: skip

    def take(number: int) -> float:
        began = time.perf_counter()
        for _ in range(number):
            next(records)
        return (time.perf_counter() - began) / number

    return take


def reduce_seconds(size: int, group, turn: float) -> float:
    """The seconds of an all_reduce of so many bytes."""
    message = torch.zeros(size // 4)

    def once() -> float:
        began = time.perf_counter()
        distributed.all_reduce(message, group=group)
        return time.perf_counter() - began

    first = torch.tensor([median(once() for _ in range(5))])
    distributed.all_reduce(first, group=group)  # so that all take as many
    return median(once() for _ in range(max(5, min(1000, int(turn / first.item())))))


def work(rank: int, processes: int, folder: str, names: list[str], options: argparse.Namespace) -> None:
    """The last process takes its steps alone, on as many threads as there are others; these, on one each, together."""
    warnings.simplefilter("ignore")
    alone = rank == processes
    torch.set_num_threads(processes if alone else 1)
    meeting = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": processes + 1}
    distributed.init_process_group("gloo", timeout=timedelta(hours=1), **meeting)
    group = distributed.new_group(list(range(processes)))
    found: dict = {"workloads": {}, "all_reduce": {}}
    for name in names:
        take = steps(name, options.seed, None if alone else group)
        rounds: dict[str, list[float]] = {"alone": [], "together": []}
        number = torch.tensor([1])
        for turn in range(options.rounds + 1):  # the first to warm up
            for kind in rounds:
                if (kind == "alone") == alone:
                    rounds[kind].append(take(int(number)))
                distributed.barrier()
            if turn == 0:
                seconds = take(2) if alone else 0.0
                number = torch.tensor([max(1, int(options.turn / seconds)) if alone else 0])
                distributed.broadcast(number, src=processes)
                if not alone:
                    take(1)
                distributed.barrier()
        own = rounds["alone" if alone else "together"][1:]
        parameters = sum(p.numel() for p in build(find(name), torch.float32, 0).model.parameters())
        found["workloads"][name] = {
            "title": find(name).title,
            "tasks": find(name).tasks,
            "gradient_bytes": 4 * parameters,
            "milliseconds": 1e3 * median(own),
            "rounds": [1e3 * seconds for seconds in own],
        }
    for size in () if alone else SIZES:
        found["all_reduce"][size] = reduce_seconds(size, group, options.turn)
    if rank in (0, processes):
        Path(folder, "alone" if alone else "together").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def measured(names: list[str], options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (options.processes, folder, names, options), options.processes + 1)
        alone, together = (json.loads(Path(folder, kind).read_text()) for kind in ("alone", "together"))
    workloads = {
        name: {
            **{key: facts[key] for key in ("title", "tasks", "gradient_bytes")},
            "one_process": {key: facts[key] for key in ("milliseconds", "rounds")},
            "many_processes": {key: together["workloads"][name][key] for key in ("milliseconds", "rounds")},
        }
        for name, facts in alone["workloads"].items()
    }
    return {
        "machine": _processor(), "cores": CORES, "load_before": os.getloadavg()[0], "python": platform.python_version(),
        "torch": torch.__version__, "commit": _commit(), "date": date.today().isoformat(), "seed": options.seed,
        "processes": options.processes, "all_reduce_seconds": together["all_reduce"], "workloads": workloads,
    }  # fmt: skip


def fitted(results: dict) -> tuple[float, float]:
    """The seconds of a message, and the bytes a second, that the smallest and the largest all_reduce tell.

    In a ring of N, 2 (N - 1) messages of an N-th of the bytes follow each other.
    """
    number, seconds = (
        results["processes"],
        {int(size): s for size, s in results["all_reduce_seconds"].items()},
    )
    messages, most = 2 * (number - 1), max(seconds)
    latency = min(seconds.values()) / messages
    return latency, messages / number * most / (seconds[most] - messages * latency)


def ring_seconds(size: float, workers: int, latency: float, bandwidth: float) -> float:
    """Reckoned: an all_reduce of so many bytes among so many workers."""
    return 2 * (workers - 1) * (latency + size / workers / bandwidth)


def reckoned(results: dict) -> list[list[str]]:
    """Of each workload and network: the tasks for each worker that take as long as the communication of a step."""
    networks = {"as measured here": fitted(results), **NETWORKS}
    heading = ["workload", "gradient, kB", "ms a task", "network", *(f"{n} workers" for n in WORKERS)]
    rows = [heading]
    for name, facts in results["workloads"].items():
        # of one thread, as each worker has
        per_task = results["processes"] * facts["many_processes"]["milliseconds"] / facts["tasks"] / 1e3
        for network, (latency, bandwidth) in networks.items():
            seconds = [ring_seconds(facts["gradient_bytes"], n, latency, bandwidth) for n in WORKERS]
            cells = [f"{_short(1e3 * each)} ms, {_short(each / per_task)} tasks" for each in seconds]
            rows.append(
                [name, f"{facts['gradient_bytes'] / 1e3:.0f}", _short(1e3 * per_task), network, *cells]
            )
    return rows


def beside(results: dict) -> list[list[str]]:
    """Of each workload, the two times and how many times faster the processes are."""
    processes = results["processes"]
    rows = [
        [
            "workload",
            "tasks",
            f"1 process, {processes} threads, ms",
            f"{processes} processes, 1 thread, ms",
            "faster",
        ]
    ]
    for name, facts in results["workloads"].items():
        one, many = facts["one_process"], facts["many_processes"]
        ratio = median(a / b for a, b in zip(one["rounds"], many["rounds"]))
        times = [_short(each["milliseconds"]) for each in (one, many)]
        rows.append([name, str(facts["tasks"]), *times, f"{ratio:.2f}"])
    return rows


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def as_table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def page(results: dict) -> str:
    """The two tables, with what they were measured on."""
    latency, bandwidth = fitted(results)
    where = f"{report.origin(results, results['seed'])}; load before it {results['load_before']:.1f}."
    told = (
        f"Reckoned, not measured. An all_reduce between {results['processes']} processes here: {1e3 * latency:.2g} ms "
        f"for a message and {bandwidth / 1e9:.2g} GB/s."
    )
    return f"{where}\n\n{as_table(beside(results))}\n\n{told}\n\n{as_table(reckoned(results))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help="letters; default: all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=0.5, help="seconds of each turn at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--render", action="store_true", help="the tables of what --out holds, measuring nothing"
    )
    options = parser.parse_args()
    if not options.render:
        if unknown := set(options.workloads) - {*WORKLOADS, *TINY}:
            raise SystemExit(
                f"unknown workloads {sorted(unknown)}; there are: {', '.join([*WORKLOADS, *TINY])}"
            )
        results = measured(options.workloads, options)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(options.out.read_text())
    text = page(results)
    print(text)
    if options.render:
        document = ROOT / "docs" / "performance.md"
        report.put(text, document, "ranks")


if __name__ == "__main__":
    main()
