"""One workload, all contestants: exactness first, then interleaved rounds of timing, each in a process of its own."""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.contestants import Contestant, contestants
from benchmarks.exactness import FLOAT32, FLOAT64
from benchmarks.process import Worker
from benchmarks.worker import GEMM
from benchmarks.workloads import find


@dataclass(frozen=True)
class Options:
    """threads: for each contestant. rounds: of timing. turn: seconds, at least, of one contestant's turn in a
    round. limit: seconds after which a compilation is stopped. slow: a contestant this many times
    slower than the fastest takes part in the first two rounds only. globs: names of contestants.
    """

    threads: int
    seed: int = 0
    rounds: int = 7
    turn: float = 0.5
    limit: float = 200.0
    slow: float = 3.0
    globs: tuple[str, ...] = ("*",)


RUN_LIMIT = 900.0  # seconds that an answer without compilation may take: something hangs


def race(name: str, options: Options, say: Callable[[str], None] = print) -> dict:
    """The record of a workload, ready for JSON: see `contestants` in it for each one's row.

    Rows hold `reason` where a contestant could not take part. Otherwise error_float64, error_float32,
    compile_seconds, memory and memory_first (bytes, see worker.py), milliseconds (median over rounds), quartiles,
    rounds (ms by round) and ratio, its time to that of this project's fastest, the median over shared rounds.
    """
    began = time.time()
    workload = find(name)
    table = {
        key: value
        for key, value in contestants(workload).items()
        if any(fnmatchcase(key, glob) for glob in options.globs)
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        common = {"workload": name, "seed": options.seed, "file": str(folder / "reference.pt")}
        with Worker(options.threads, folder) as worker:
            answer = worker.ask(RUN_LIMIT, do="reference", **common)
        if "reason" in answer:
            raise RuntimeError(f"workload {name}: the reference failed: {answer['reason']}")
        flops = answer["flops"]
        rows = {key: _check(key, table[key], folder, common, options, say) for key in table}
        workers = {}
        for key in [key for key, row in rows.items() if "reason" not in row]:
            worker = stack.enter_context(Worker(options.threads, _cache(folder, key)))
            rows[key] |= _open(worker, key, table[key], common, options)
            say(f"{name}  {key}: {rows[key].get('reason', 'ready')}")
            if "reason" not in rows[key]:
                workers[key] = worker
        gemm = stack.enter_context(Worker(options.threads, folder))
        gemm.ask(RUN_LIMIT, do="open", contestant="gemm", **(common | {"file": None}))
        peak = _rounds(rows, workers, gemm, options, say)
    for key, row in rows.items():
        row |= {"ours": table[key].ours, "own_net": table[key].own, "compiled": table[key].compiled}
    _summarise(rows, flops, peak)
    return {
        "title": workload.title,
        "target": workload.target,
        "flops": flops,
        "gemm_gflops": peak / 1e9,
        "rounds": options.rounds,
        "minutes": (time.time() - began) / 60,
        "contestants": rows,
    }


def _check(key: str, contestant: Contestant, folder: Path, common: dict, options: Options, say) -> dict:
    """Float64 against the reference."""
    limit = options.limit if contestant.compiled else RUN_LIMIT
    with Worker(options.threads, _cache(folder, key)) as worker:
        answer = worker.ask(limit, do="check", contestant=key, **common)
    if "reason" in answer:
        row = answer
        if contestant.absence and row["reason"].startswith("not installed"):
            row["reason"] += f"; {contestant.absence}"
    elif not answer["error"] <= FLOAT64:
        row = {"reason": f"not exact: {answer['error']:.1e} from the float64 reference"}
    else:
        row = {"error_float64": answer["error"]}
    say(f"{common['workload']}  {key}: {row.get('reason', 'exact')}")
    return row


def _open(worker: Worker, key: str, contestant: Contestant, common: dict, options: Options) -> dict:
    limit = options.limit if contestant.compiled else RUN_LIMIT
    answer = worker.ask(limit, do="open", contestant=key, **common)
    if "reason" in answer:
        return answer
    if not answer["error_float32"] <= FLOAT32:
        return {"reason": f"wrong in float32: {answer['error_float32']:.1e} from the float64 reference"}
    if contestant.compiled:
        answer["compile_seconds"] = answer["first_seconds"] - answer["second_seconds"]
    return answer


def _rounds(rows: dict, workers: dict[str, Worker], gemm: Worker, options: Options, say) -> float:
    """Time all workers in turns of shuffled order; rows get `rounds`. Returns the GEMM peak in FLOP/s."""
    shuffle = random.Random(options.seed).shuffle
    best_gemm = math.inf
    for key in workers:
        rows[key]["rounds"] = []
    for number in range(options.rounds):
        order = [
            key for key in workers if "reason" not in rows[key] and (number < 2 or not rows[key]["slow"])
        ]
        shuffle(order)
        for key in order:
            row = rows[key]
            runs = math.ceil(options.turn / max(row["second_seconds"], 1e-6))
            runs = 1 if runs == 1 else min(runs + 1, 2000)
            answer = workers[key].ask(RUN_LIMIT, do="time", runs=runs)
            if "reason" in answer:
                row |= answer
                continue
            seconds = answer["seconds"][min(1, runs - 1) :]  # the first of many runs finds cold caches
            row["rounds"].append(1e3 * statistics.median(seconds))
            row["second_seconds"] = statistics.median(seconds)
        answer = gemm.ask(RUN_LIMIT, do="time", runs=30)
        if "reason" in answer:
            raise RuntimeError(f"the matrix product failed: {answer['reason']}")
        best_gemm = min(best_gemm, *answer["seconds"])
        timed = [key for key in workers if "reason" not in rows[key]]
        fastest = min((statistics.median(rows[key]["rounds"]) for key in timed), default=0)
        for key in timed:
            rows[key]["slow"] = statistics.median(rows[key]["rounds"]) > options.slow * fastest
        say(f"round {number + 1} of {options.rounds}")
    return 2 * GEMM**3 / best_gemm


def _summarise(rows: dict, flops: int, peak: float) -> None:
    timed = {key: row for key, row in rows.items() if "reason" not in row}
    for row in timed.values():
        row["milliseconds"] = statistics.median(row["rounds"])
        many = len(row["rounds"]) > 1
        row["quartiles"] = statistics.quantiles(row["rounds"], n=4) if many else row["rounds"] * 3
        row["of_gemm_peak"] = flops / (row["milliseconds"] / 1e3) / peak
        for temporary in ("slow", "first_seconds", "second_seconds"):
            del row[temporary]
    ours = [row for row in timed.values() if row["ours"]]
    if ours:
        best = min(ours, key=lambda row: row["milliseconds"])
        for row in timed.values():
            row["ratio"] = statistics.median(a / b for a, b in zip(row["rounds"], best["rounds"]))


def _cache(folder: Path, key: str) -> Path:
    """Where a contestant's compiled code goes: kept between its processes, fresh in each race."""
    return folder / key.replace(" ", "-")
