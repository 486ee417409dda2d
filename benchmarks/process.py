"""The other end of worker.py: starts the process, asks it, and stops it when it takes too long."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Worker:
    """One worker process of its own group, with `threads` threads and a compile cache in `cache`."""

    def __init__(self, threads: int, cache: Path):
        self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed in close()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "JAX_PLATFORMS": "cpu",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.worker", str(threads)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
        )

    def ask(self, limit: float, **request) -> dict:
        """Its answer; after `limit` seconds without one it is stopped, and the answer is the reason."""
        if self.log.closed:
            return {"reason": "the process was stopped before"}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        if not ready:
            self.close()
            return {"reason": f"stopped after {limit:.0f} s"}
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["no message"])[-1]
        self.close()
        return {"reason": f"the process ended with status {status}: {last[:300]}"}

    def close(self) -> None:
        """Stop the process and whatever it started (compilers)."""
        if self.log.closed:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
