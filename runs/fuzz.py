"""Thousands of files and command lines that mean harm, each in a process of its own with limits; counts as JSON.

    python runs/fuzz.py --cases 3000 --seed 0 --out runs/fuzz

A case may take 30 seconds and 2 GB beside what the program itself takes. What became of the cases, by kind, is written
to fuzz.json in the folder; faults are told in words, each with its kind and number, by which it can be repeated.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from fomaml.app.rundir import circumstances  # noqa: E402
from fomaml.files import write_text  # noqa: E402
from hostile import CASES, outcome, write  # noqa: E402

SECONDS, BYTES = 30, 2 * 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="KIND:NUMBER", help="these cases again, in this order")
    parser.add_argument("--kinds", nargs="+", default=[*CASES])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "fuzz")
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts: dict[str, collections.Counter] = {kind: collections.Counter() for kind in given.kinds}
    faults, slowest, began = [], 0.0, time.time()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        write(base)
        cases = [(given.kinds[number % len(given.kinds)], number) for number in range(given.cases)]
        if given.only:
            cases = [(kind, int(number)) for kind, number in (name.rsplit(":", 1) for name in given.only)]
        for done, (kind, number) in enumerate(cases, 1):
            place = Path(folder) / "case"
            place.mkdir()
            start = time.time()
            found = limited(kind, base, place, random.Random(f"{given.seed} {kind} {number}"))
            slowest = max(slowest, time.time() - start)
            shutil.rmtree(place, ignore_errors=True)
            counts[kind][found if found in ("clean", "refused") else "fault"] += 1
            if found not in ("clean", "refused"):
                faults.append({"case": f"{kind}:{number}", "fault": found.replace(folder, "")})
                print(f"{kind}:{number}: {found}", flush=True)
            if done % 100 == 0:
                print(
                    f"{done} of {len(cases)}, {len(faults)} faults, {time.time() - began:.0f} s", flush=True
                )
    result = {
        "cases": len(cases), "seed": given.seed, "seconds_per_case": SECONDS, "bytes_per_case": BYTES,
        "slowest_seconds": round(slowest, 1), "by_kind": {kind: dict(own) for kind, own in counts.items()},
        "faults": faults, **circumstances(),
    }  # fmt: skip
    if not given.only:
        write_text(given.out / "fuzz.json", json.dumps(result, indent=2) + "\n")
    print({name: sum(own[name] for own in counts.values()) for name in ("clean", "refused", "fault")})
    raise SystemExit(1 if faults else 0)


def limited(kind: str, base: Path, place: Path, numbers: random.Random) -> str:
    """The outcome of a case in a process of its own."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        found = "the process ended"
        try:
            size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            found = outcome(kind, base, place, numbers)
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        finally:
            os.write(writes, found.encode("utf-8", "backslashreplace")[:4000])
            os._exit(0)
    os.close(writes)
    if not select.select([reads], [], [], SECONDS)[0]:
        os.kill(child, signal.SIGKILL)
    said = os.read(reads, 8000).decode()
    os.close(reads)
    status = os.waitpid(child, 0)[1]
    if said:
        return said
    return f"more than {SECONDS} seconds" if os.WTERMSIG(status) == signal.SIGKILL else f"ended with {status}"


if __name__ == "__main__":
    main()
