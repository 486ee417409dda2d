"""A command of `fomaml` in the processes that torchrun would start, without torchrun and its seconds."""

import contextlib
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import multiprocessing

from moments import sending


class Ended(NamedTuple):
    """How a process ended. status: of its exit."""

    status: int
    out: str
    err: str


def started(
    ranks: int,
    folder: Path,
    *arguments: str,
    of_rank: Mapping[int, Sequence[str]] | None = None,
    environ: Mapping[str, str] | None = None,
    signals: Mapping[int, tuple[int, int]] | None = None,
) -> list[Ended]:
    """What each of so many processes of one command says, which have `folder` as their working directory.

    of_rank: further arguments of single ones. environ: what torchrun would say further. signals: by rank, one that
    the process sends to itself, and in which iteration.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no start of processes that is quick and safe here")
    # what takes seconds to import is imported once, by the process that these ones are forked from
    multiprocessing.set_forkserver_preload(["torch._dynamo", "fomaml.app.cli"])
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    shared = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **(environ or {}),
    }  # fmt: skip
    processes = []
    for rank in range(ranks):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for kind in ("out", "err"):  # also of a process that is killed at once
            (folder / f"{kind} {rank}").write_text("")
        words = [*arguments, *(of_rank or {}).get(rank, ())]
        sent = (signals or {}).get(rank)
        processes.append(context.Process(target=_run, args=(folder, own, words, sent)))
        processes[-1].start()
    try:
        for process in processes:
            process.join(600)
            assert process.exitcode is not None, f"{process.name} hangs"
    finally:
        for process in processes:
            process.kill()
    read = [[(folder / f"{kind} {rank}").read_text() for kind in ("out", "err")] for rank in range(ranks)]
    return [Ended(process.exitcode, *texts) for process, texts in zip(processes, read)]


def _run(folder: Path, environ: dict[str, str], arguments: list[str], sent: tuple[int, int] | None) -> None:
    os.environ.update(environ)
    os.chdir(folder)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    rank = environ["RANK"]
    with (
        open(f"out {rank}", "w", buffering=1) as sys.stdout,
        open(f"err {rank}", "w", buffering=1) as sys.stderr,
        warnings.catch_warnings(),
    ):
        from fomaml.app import session
        from fomaml.app.cli import main

        if sent is not None:
            session.train = sending(session.train, *sent)
        status = 0
        try:
            main(arguments)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            os._exit(status)
