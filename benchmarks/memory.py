"""The memory promise: peak memory of a first-order meta-gradient does not grow with the inner steps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from statistics import median

from benchmarks.contestants import contestants
from benchmarks.process import Worker
from benchmarks.race import RUN_LIMIT, Options
from benchmarks.workloads import find

STEPS = (1, 20)
REPEATS = 3  # in processes of their own: what is resident varies by a tenth with where the heap has holes


def over_steps(name: str, options: Options, say: Callable[[str], None] = print) -> dict:
    """Peak bytes of the engines, also compiled, and of the plain loop at 1 and 20 inner steps, float32; their ratio.

    Medians over processes, each with a seed of its own.
    """
    rows = {}
    for key, contestant in contestants(find(name)).items():
        takes_part = key == "plain loop" or contestant.ours
        if not takes_part or not any(fnmatchcase(key, glob) for glob in options.globs):
            continue
        answers = []
        for steps, repeat in product(STEPS, range(REPEATS)):
            with tempfile.TemporaryDirectory() as cache, Worker(options.threads, Path(cache)) as worker:
                request = {"workload": name, "seed": options.seed + repeat, "steps": steps, "contestant": key}
                answers.append(worker.ask(2 * RUN_LIMIT, do="open", **request))
        reasons = [answer["reason"] for answer in answers if "reason" in answer]
        if reasons:
            rows[key] = {"reason": reasons[0]}
        else:
            few, many = answers[:REPEATS], answers[REPEATS:]
            first, last = (median(answer["memory"] for answer in each) for each in (few, many))
            rows[key] = {"memory": dict(zip(STEPS, (first, last))), "ratio": last / first if first else None}
        say(f"memory on {name}  {key}: {rows[key].get('reason', rows[key].get('ratio'))}")
    return {"title": find(name).title, "contestants": rows}
