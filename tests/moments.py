"""What happens at a moment that a test chooses, and does not depend on how fast or busy the machine is."""

import os
from types import SimpleNamespace

TICK = 0.001  # seconds that pass whenever somebody looks at the clock


class Ticking:
    """The clock of runs: it goes on by `TICK` at each look, and by what a test lets pass."""

    def __init__(self, patch):
        self.now = 0.0
        patch.setattr("fomaml.app.agenda.time", SimpleNamespace(perf_counter=self.look))

    def look(self):
        self.now += TICK
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def sending(real, number, at):
    """A session's `train` that sends this signal to its own process while it computes an iteration."""

    def train(*arguments, **options):
        for record in real(*arguments, **options):
            if record.iteration == at:
                os.kill(os.getpid(), number)
            yield record

    return train
