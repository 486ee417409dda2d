"""Ctrl-C and SIGTERM in a run: the outer step at hand is finished and saved, and then the run stops."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run was asked to stop. number: of the signal. A KeyboardInterrupt, so that nothing takes it for an error."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def status_of(stopped: KeyboardInterrupt) -> int:
    """The exit status of a process that a signal has ended, as shells give it."""
    return 128 + (stopped.number if isinstance(stopped, Stopped) else signal.SIGINT)


class Interrupts:
    """What was asked for so far, and when it is heard."""

    def __init__(self) -> None:
        self.wanted: int | None = None
        self._finishing = False

    @property
    def asked(self) -> int | None:
        """The signal that is to be obeyed, if any."""
        return self.wanted

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Within it the first signal is only taken note of: the block ends first. The second stops it at once."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def heard(self, number: int, frame: FrameType | None) -> None:
        again, self.wanted = self.wanted is not None, number
        if again or not self._finishing:
            raise Stopped(number)

    def raise_if_asked(self) -> None:
        if self.asked is not None:
            raise Stopped(self.asked)


@contextlib.contextmanager
def listening(interrupts: Interrupts | None = None) -> Iterator[Interrupts]:
    """Within it both signals are heard, in the main thread, which alone can. interrupts: who hears them."""
    interrupts = interrupts or Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.signal(number, interrupts.heard) for number in SIGNALS}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
