"""How this process was started: alone, or by torchrun as one of many, which then work on one run together.

Before their group begins, the processes meet at torchrun's store, so that bad input is still one line: they agree there
on what was found wrong and on what the first of them decides.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from fomaml.errors import InputError, in_one_line
from fomaml.ranks import RankError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(hours=2)  # that one process waits for another: to read data may take long
LAST_WORDS = timedelta(seconds=10)
AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun keeps the store itself
COMMANDS = ("train", "evaluate", "compare")  # that take many processes


class Launch:
    """One of the processes of a run.

    rank: its number, of `size`; the first alone prints and writes. local_rank, local_size: the same on its machine.
    restarts: how often torchrun has started all processes again, as one of them had died.
    name: of what they do together; each such thing has its own. hosts: whether rank 0 keeps the store where torchrun
    does not.
    """

    def __init__(self, environ: Mapping[str, str], name: str = "run", hosts: bool = True):
        self.name, self._environ = name, environ
        self._hosts, self._met = hosts, 0
        self._store: Any = None
        self.rank, self.size, self.local_rank, self.local_size, self.restarts = 0, 1, 0, 1, 0
        self._wrong = ""
        if not all(each in environ for each in NAMES):
            return
        try:
            self.rank, self.local_rank, self.size, self.local_size = (
                int(environ[each]) for each in NAMES[:4]
            )
            self.restarts = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
            self._port = int(environ["MASTER_PORT"])
        except ValueError:
            self.size, self._wrong = 1, ", ".join(f"{each}={environ[each]}" for each in NAMES)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.size > 1

    def check_command(self, command: str) -> None:
        """Raise `InputError` where a command is one for a single process, or the environment is not torchrun's."""
        if self._wrong:
            raise InputError(f"the environment is not that of torchrun: {self._wrong}")
        if self.many and command not in COMMANDS:
            names = f"{', '.join(COMMANDS[:-1])} and {COMMANDS[-1]}"
            raise InputError(
                f"fomaml {command} runs in one process, and {self.size} were started: {names} take many"
            )

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """Within it, a whole command, the first process alone prints and warns."""
        try:
            if self.first:
                yield
                return
            with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                    yield
        finally:
            self._leave()

    # --- before the group begins ----------------------------------------------------------------------

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """What fails within it in one process is an error in all of them."""
        error: Exception | None = None
        try:
            yield
        except Exception as found:  # whatever code of one's own raises
            error = found
        if not self.many:
            if error is not None:
                raise error
            return
        self._met += 1
        store, key = self._meeting(), f"checked {self._met}"
        if error is not None:
            kind = "input" if isinstance(error, InputError) else "other"
            store.set(f"{key} wrong", f"{kind}:{in_one_line(error)} (rank {self.rank} of {self.size})")
        if store.add(key, 1) == self.size:
            store.set(f"{key} by all", "")
        store.wait([f"{key} by all"], PATIENCE)
        if error is not None:
            raise error
        if store.check([f"{key} wrong"]):
            kind, _, text = store.get(f"{key} wrong").decode().partition(":")
            raise (InputError if kind == "input" else RankError)(text)

    def decided(self, decide: Callable[[], str]) -> str:
        """What the first process decides; what it fails at is an error in all of them."""
        if not self.many:
            return decide()
        key, text = f"decided {self._met + 1}", ""
        with self.checking():
            if self.first:
                text = decide()
                self._meeting().set(key, text)
        return text if self.first else self._meeting().get(key).decode()

    def _meeting(self) -> Any:
        """The store: a table in one process, which all of them reach. Of each start torchrun makes, another table."""
        if self._store is None:
            keeps = self.first and self._hosts and self._environ.get(AGENT) != "True"
            whole = distributed.TCPStore(self._environ["MASTER_ADDR"], self._port, None, keeps, PATIENCE)
            self._store = distributed.PrefixStore(f"fomaml {self.name} {self.restarts}", whole)
        return self._store

    def _leave(self) -> None:
        """Ask nothing more of the store. The process that keeps it waits for the others, but for those that died."""
        if self._store is None or not self._hosts or self._environ.get(AGENT) == "True":
            return
        with contextlib.suppress(RuntimeError):
            if self._store.add("left", 1) == self.size:
                self._store.set("all have left", "")
            if self.first:
                self._store.wait(["all have left"], LAST_WORDS)

    # --- the group ------------------------------------------------------------------------------------

    def device(self, name: str) -> str:
        """The device of this process, of the one that was asked for: each has a GPU of its own.

        Raises:
            InputError: one GPU for all of them, or fewer of them than processes on this machine.
        """
        if not self.many or not name.startswith("cuda"):
            return name
        if name not in ("cuda", "cuda:0"):  # which a run has recorded
            raise InputError(f"{self.size} processes take a GPU each: give --device cuda, got {name}")
        there = torch.cuda.device_count()
        if there < self.local_size:
            raise InputError(
                f"{self.local_size} processes on a machine with {there} CUDA devices: start {there} there"
            )
        return f"cuda:{self.local_rank}"

    @contextlib.contextmanager
    def joined(self, device: str) -> Iterator[Any]:
        """Within it the processes are a group of torch.distributed, which is given; None of one process alone."""
        if not self.many:
            yield None
            return
        if device.startswith("cuda"):
            torch.cuda.set_device(torch.device(device))
        backend = "nccl" if device.startswith("cuda") else "gloo"
        distributed.init_process_group(
            backend,
            store=distributed.PrefixStore("group", self._meeting()),
            rank=self.rank,
            world_size=self.size,
        )
        try:
            yield distributed.group.WORLD
        finally:
            distributed.destroy_process_group()

    # --- threads --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def computing(self, threads: int | None) -> Iterator[None]:
        """Within it torch has so many threads, or what suits this process."""
        before, wanted = torch.get_num_threads(), threads or self.threads()
        if wanted is not None:
            torch.set_num_threads(wanted)
        try:
            yield
        finally:
            if wanted is not None:
                torch.set_num_threads(before)

    def threads(self) -> int | None:
        """The threads that suit this process, where torchrun has set them to one by itself: its share of the cores."""
        if not self.many or self._environ.get("OMP_NUM_THREADS") != "1" or self._asked_for_one_thread():
            return None
        return max(1, cores() // self.local_size)

    def _asked_for_one_thread(self) -> bool:
        """Whether OMP_NUM_THREADS was set before torchrun began, as far as the system tells."""
        try:
            before = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        except OSError:
            return False
        return any(each.startswith(b"OMP_NUM_THREADS=") for each in before)


def cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def launched() -> Launch:
    """How this process was started."""
    return Launch(os.environ)
