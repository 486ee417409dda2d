"""What the processes of a run do together: the first one reads and writes for all. Of one process alone, nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fomaml.app import rundir
from fomaml.app.build import Data
from fomaml.app.device import reproducible
from fomaml.app.interrupts import Interrupts, listening
from fomaml.app.inventory import describe_directory
from fomaml.app.launch import Launch
from fomaml.app.settings import Settings, to_json
from fomaml.app.states import States
from fomaml.checkpoint import load_progress, load_state, save_state
from fomaml.devices import forked_random
from fomaml.errors import InputError
from fomaml.files import write_text
from fomaml.ranks import Ranks


class Together:
    """The processes of one run.

    ranks: once they have joined, what `train` and `evaluate` take as their group; None for one process alone, unless it
    is to have the same bits as many.
    """

    def __init__(self, launch: Launch, settings: Settings):
        self.launch, self.settings = launch, settings
        self.ranks: Ranks | None = None
        self.interrupts: Interrupts = SharedInterrupts(self) if launch.many else Interrupts()
        self._seconds = 0.0
        self._group = contextlib.ExitStack()

    @property
    def first(self) -> bool:
        return self.launch.first

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Within it `ranks` are there."""
        settings = self.settings
        with self._group:
            group = self._group.enter_context(self.launch.joined(settings.device))
            if group is not None or settings.same_bits:
                self.ranks = Ranks(
                    group,
                    same_bits=settings.same_bits,
                    threads=settings.threads or 1,
                    piece=settings.tasks_at_once,
                    notes=self._notes,
                )
            yield

    def part(self) -> None:
        """All that they share is done: each goes on alone."""
        if self.ranks is not None:
            self.ranks.sum(torch.zeros(1))  # which ends where all have come to it
        self.ranks = None
        self._group.close()

    def states(self, *arguments: Any) -> States:
        """The files of the run; arguments: of `States`."""
        return SharedStates(self, *arguments) if self.launch.many else States(*arguments)

    def told(self) -> Iterator[str]:
        """What the first lines say of the processes."""
        launch, threads = self.launch, torch.get_num_threads()
        if launch.many:
            backend = "nccl" if self.settings.device.startswith("cuda") else "gloo"
            each = "1 thread" if threads == 1 else f"{threads} threads"
            yield f"{launch.size} processes of {each} each, by {backend}"
        if self.settings.same_bits:
            threads = self.settings.threads or 1
            yield f"the same bits for any number of processes, each with {threads} thread{'s'[: threads > 1]}"

    def _notes(self) -> list[float]:
        """Whether this process was asked to stop, and the seconds of training that the first one has counted."""
        wanted = getattr(self.interrupts, "wanted", None)
        return [wanted == signal.SIGINT, wanted == signal.SIGTERM, self._seconds if self.first else 0.0]

    def seconds(self, own: float) -> float:
        """The seconds of training that all processes go by, the first one's, of its last step. own: this process's."""
        self._seconds = own
        if not self.launch.many or self.ranks is None or not self.ranks.noted:
            return own
        return self.ranks.noted[2]


class Begun(Protocol):
    """What `begun` gives: a run, its settings as the data have completed them, and who hears signals in it."""

    settings: Settings
    data: Data
    interrupts: Interrupts
    was_finished: bool


Run = TypeVar("Run", bound=Begun)


@contextlib.contextmanager
def begun(
    launch: Launch, settings: Settings, out: Path, resume: bool, make: Callable[[Settings, Together], Run]
) -> Iterator[Run]:
    """The run that is made of settings, all of whose processes have found their input good and work together.

    The first of them holds the directory `out`. Where torchrun has started them again, a run of the same settings that
    is there goes on, without `resume` too; one that was finished says so, and nothing is begun.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(reproducible(settings.device))
        stack.enter_context(launch.computing(settings.threads if settings.same_bits else None))
        with launch.checking():
            if resume and launch.first and rundir.is_finished(out):
                raise InputError(f"the run in {out} is finished; see {out / rundir.RESULT_TEXT}")
            together = Together(launch, dataclasses.replace(settings, device=launch.device(settings.device)))
            run = make(together.settings, together)
        if launch.restarts and not resume:
            before = launch.decided(lambda: rundir.begun_before(run.settings, out))
            resume, run.was_finished = before == "begun", before == "finished"
        if run.was_finished:
            yield run
            return
        with launch.checking():
            if launch.first:
                stack.enter_context((rundir.alone if resume else rundir.claimed)(out))
        stack.enter_context(forked_random())
        stack.enter_context(together.joined())
        run.interrupts = stack.enter_context(listening(together.interrupts))
        torch.manual_seed(settings.seed)  # dropout draws from there
        if launch.first and (not resume or settings.code or settings.changed):  # a change that was accepted
            write_text(out / rundir.CONFIG, to_json(run.settings))
            describe_directory(run.settings, run.data, out)
        yield run


class SharedInterrupts(Interrupts):
    """Those of a process of many: which step is the last one is for all of them to agree.

    wanted: the signal that this process was sent. asked: that any of them had been sent when they last added up.
    """

    def __init__(self, together: Together):
        super().__init__()
        self._together = together

    @property
    def asked(self) -> int | None:
        ranks = self._together.ranks
        if ranks is None:
            return super().asked
        if not ranks.noted:
            return None
        by_keyboard, by_signal, *_ = ranks.noted
        return signal.SIGTERM if by_signal else signal.SIGINT if by_keyboard else None


class SharedStates(States):
    """The files of a run of many processes: the first one's, which the others take over."""

    def __init__(self, together: Together, *arguments: Any):
        super().__init__(*arguments)
        self.together = together

    @property
    def ranks(self) -> Ranks:
        assert self.together.ranks is not None
        return self.together.ranks

    def is_time(self) -> bool:
        return self.together.first and super().is_time()

    def save(self, iteration: int, progress: Mapping[str, Any]) -> None:
        if self.together.first:
            super().save(iteration, progress)

    def save_best(self) -> None:
        if self.together.first:
            super().save_best()

    def exist(self) -> bool:
        return (
            self.ranks.take_over_bytes(b"yes" if self.together.first and super().exist() else b"") == b"yes"
        )

    def take_up(self) -> tuple[int, dict[str, Any]]:
        found: tuple[int, dict[str, Any]] = 0, {}
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / rundir.STATE
            with self.ranks.agreeing():
                if self.together.first:
                    found = super().take_up()
                    if found[0]:
                        save_state(state, self.learner, self.optimizer, *found, self.identity)
            content = self.ranks.take_over_bytes(state.read_bytes() if state.exists() else b"")
            if content and not self.together.first:
                state.write_bytes(content)
                found = load_state(state, self.learner, self.optimizer, self.identity), load_progress(state)
        return found

    def load_best(self) -> None:
        with self.ranks.agreeing():
            if self.together.first:
                super().load_best()
        self.ranks.take_over([*self.learner.state_dict().values()])

    def has_best(self, iteration: int) -> bool:
        there = False
        with self.ranks.agreeing():
            if self.together.first:
                there = super().has_best(iteration)
        return self.ranks.take_over_bytes(b"yes" if there else b"") == b"yes"
