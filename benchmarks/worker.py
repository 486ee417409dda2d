"""A process that runs one contestant when it is told to: one JSON request a line on stdin, one answer a line.

Requests: {"do": "reference", "file"}, {"do": "check", "contestant", "file"}, {"do": "open", "contestant",
"file"}, {"do": "time", "runs"}; the first three with "workload", "seed" and, where they are not the
workload's own, "steps"; open without a file compares with nothing. An answer with "reason" says why it
could not be done. `python -m benchmarks.worker THREADS`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import by_hand, exactness
from benchmarks.contestants import contestants
from benchmarks.workloads import build, find

GEMM = 1024


def reference(request: dict) -> dict:
    """Save the float64 reference to a file; the floating-point operations of the plain loop."""
    setup = _build(request, torch.float64)
    torch.save(exactness.reference(setup), request["file"])
    run, _ = by_hand.loop(setup)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return {"flops": counter.get_total_flops()}


def check(request: dict) -> dict:
    """The error in float64 against the reference, seconds of the first run."""
    run, read = _make(request, torch.float64)
    began = time.perf_counter()
    found = read(run())
    seconds = time.perf_counter() - began
    return {"error": exactness.error(found, torch.load(request["file"])), "first_seconds": seconds}


class Timed:
    """A contestant in float32, ready to be timed.

    memory: peak bytes over what is held when the first run is done (the imports, the data, the
    parameters, compiled code); memory_first: over what was held before it.
    """

    def __init__(self, request: dict):
        self.run, read = _gemm(request) if request["contestant"] == "gemm" else _make(request, torch.float32)
        before = _memory("VmRSS")
        _reset_peak()
        first, result = self._once()
        self.answer = {"first_seconds": first, "memory_first": _memory("VmHWM") - before}
        if request.get("file"):
            self.answer["error_float32"] = exactness.error(read(result), torch.load(request["file"]))
        engine = getattr(result, "engine", None)
        if engine is not None:
            self.answer["engine"] = engine
        del result
        _trim()
        held = _memory("VmRSS")
        _reset_peak()
        self.answer["second_seconds"], _ = self._once()
        self.answer["memory"] = _memory("VmHWM") - held
        _trim()

    def time(self, runs: int) -> dict:
        seconds = [self._once()[0] for _ in range(runs)]
        _trim()
        return {"seconds": seconds}

    def _once(self):
        began = time.perf_counter()
        result = self.run()
        return time.perf_counter() - began, result


def _make(request: dict, dtype: torch.dtype):
    setup = _build(request, dtype)
    return contestants(setup.workload)[request["contestant"]].make(setup)


def _build(request: dict, dtype: torch.dtype):
    return build(find(request["workload"]), dtype, request["seed"], request.get("steps"))


def _gemm(request: dict):
    left, right = torch.randn(2, GEMM, GEMM)
    out = torch.empty(GEMM, GEMM)
    return partial(torch.mm, left, right, out=out), None


def _memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with suppress(FileNotFoundError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _reset_peak() -> None:
    """Make VmHWM start again from what is resident now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _trim() -> None:
    """Give back what is free, so that idle workers hold little and peaks start from what is in use."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Session:
    """What one process is asked for, one request after the other."""

    def __init__(self):
        self.timed: Timed | None = None

    def answer(self, request: dict) -> dict:
        try:
            match request["do"]:
                case "reference":
                    return reference(request)
                case "check":
                    return check(request)
                case "open":
                    self.timed = Timed(request)
                    return self.timed.answer
                case "time":
                    return self.timed.time(request["runs"])
        except ModuleNotFoundError as reason:
            return {"reason": f"not installed: {reason}"}
        except Exception as reason:
            return {"reason": f"{type(reason).__name__}: {_first_line(reason)}"}


def _first_line(reason: Exception) -> str:
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


def _use_cores(number: int) -> None:
    """So many threads for torch, and so many cores for all: XLA asks for the affinity."""
    torch.set_num_threads(number)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if number < len(cores):
            os.sched_setaffinity(0, cores[:number])


def main() -> None:
    # what a library prints must not end up between the answers
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        _use_cores(int(sys.argv[1]))
        session = Session()
        for line in sys.stdin:
            print(json.dumps(session.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
