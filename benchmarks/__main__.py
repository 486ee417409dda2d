"""`python -m benchmarks [WORKLOAD ...]`: time this project beside its peers, write the JSON, fill in the tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import memory, report
from benchmarks.contestants import contestants
from benchmarks.process import ROOT
from benchmarks.race import Options, race
from benchmarks.workloads import TINY, WORKLOADS, find
from fomaml.engines.cpu.build import processor_facts

RESULTS = ROOT / "benchmarks" / "results" / "engines.json"
OTHERS = "engines-*.json"  # beside it, of other processors: `--out` names one
PEERS = ("higher", "torchopt", "iteryne", "parallel-metalearn", "learn2learn", "jax", "jaxlib")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main() -> None:
    arguments = _parser().parse_args()
    names = [*arguments.workload, *arguments.workloads] or list(WORKLOADS)
    for unknown in set(names) - {*WORKLOADS, *TINY}:
        raise SystemExit(f"unknown workload {unknown!r}; there are: {', '.join([*WORKLOADS, *TINY])}")
    if arguments.list:
        for name in names:
            print(name, find(name).title, *contestants(find(name)), sep="\n    ")
        return
    options = Options(
        threads=arguments.threads,
        seed=arguments.seed,
        rounds=arguments.rounds,
        turn=arguments.turn,
        limit=arguments.limit,
        slow=arguments.slow,
        globs=tuple(arguments.contestants),
    )
    out = arguments.out
    results = json.loads(out.read_text()) if out.exists() else {"workloads": {}, "memory": {}}
    run = circumstances(options)
    measure = {"workloads": race, "memory": memory.over_steps}
    if arguments.render:
        todo = []
    elif arguments.memory:
        todo = [("memory", name) for name in ([*arguments.workload, *arguments.workloads] or ["C"])]
    else:
        todo = [("workloads", name) for name in names]
    for kind, name in todo:
        if arguments.resume and results[kind].get(name, {}).get("run", {}).get("commit") == run["commit"]:
            print(f"{kind} {name}: kept")
            continue
        results[kind][name] = measure[kind](name, options) | {"run": run}
        write(results, out)
    if arguments.render:
        others = [
            json.loads((out.parent / f"{name}.json").read_text()) for name in ("adaptation", "end_to_end")
        ]
        report.put(report.summary(results, *others), ROOT / "README.md")
        report.put(report.page(results), ROOT / "docs" / "benchmarks.md")
        others = [json.loads(path.read_text()) for path in sorted(RESULTS.parent.glob(OTHERS))]
        if others:
            report.put(report.processors([results, *others]), ROOT / "docs" / "benchmarks.md", "processors")
    else:
        print(report.page(results))


def circumstances(options: Options) -> dict:
    """Where, when and with what a workload was run."""
    return {
        "machine": _processor(),
        "cores": CORES,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": {name: found for name in PEERS if (found := _version(name))},
        "commit": _commit(),
        "date": date.today().isoformat(),
        **asdict(options),
    }


def write(results: dict, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(out)


def _commit() -> str:
    """The commit, with a mark where the code differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    facts = processor_facts()
    name = facts.get("model name") or platform.processor() or platform.machine()
    # what a name such as "AMD EPYC" does not tell, and what makes factors of two
    more = ["AVX-512"] if "avx512f" in facts.get("flags", "").split() else []
    if "cpu family" in facts and not any(character.isdigit() for character in name):
        more.append(f"family {facts['cpu family']}")
    return f"{name} ({', '.join(more)})" if more else name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("workload", nargs="*", help=f"{', '.join(WORKLOADS)} (default: all), or {', '.join(TINY)}")
    add("--workloads", nargs="+", default=[], metavar="W", help="the same as an option")
    add("--contestants", nargs="+", default=["*"], metavar="GLOB", help="names of contestants to run")
    add("--rounds", type=int, default=7, help="interleaved rounds of timing")
    add("--turn", type=float, default=0.5, help="seconds, at least, of a contestant's turn in a round")
    add("--slow", type=float, default=3.0, help="so many times slower than the fastest: two rounds only")
    add("--limit", type=float, default=200.0, help="seconds after which a compilation is stopped")
    add("--threads", type=int, default=CORES, help="for each contestant (default: all cores)")
    add("--seed", type=int, default=0, help="of weights, tasks and the order of turns")
    add("--out", type=Path, default=RESULTS, help="the JSON; a workload that is run replaces its old record")
    add("--resume", action="store_true", help="leave out workloads that the JSON has from this commit")
    add("--memory", action="store_true", help="peak memory at 1 and 20 inner steps instead (default: C)")
    add("--render", action="store_true", help="write README's table and docs/benchmarks.md from the JSON")
    add("--list", action="store_true", help="list workloads and contestants")
    return parser


if __name__ == "__main__":
    main()
