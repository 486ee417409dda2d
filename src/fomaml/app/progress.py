"""What a person sees of a run that is trained: a live bar on a terminal, a plain line at every tenth elsewhere."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fomaml.app.report import duration
from fomaml.app.scores import headline
from fomaml.app.settings import Settings
from fomaml.train import Record

EVERY = 10.0  # seconds between two lines on one validation, test or set of baselines


@contextlib.contextmanager
def watching(settings: Settings, stream) -> Iterator[Watch]:
    """Shows a run's progress on a stream."""
    console = Console(file=stream)
    if not console.is_terminal:
        yield Watch(settings, lambda line: print(line, file=stream, flush=True))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("meta-training", total=settings.iterations, figures="", left="")
        yield Watch(settings, lambda line: bar.console.print(line, markup=False, highlight=False), bar, task)


class Watch:
    """Receives the measured records of a run, and by `work` how far it is; `say` prints a line."""

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None],
        bar: Progress | None = None,
        task: TaskID | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.settings, self.say, self.bar, self.task, self.clock = settings, say, bar, task, clock
        self.printed = 0
        self.left: float | None = None
        self.told = clock()
        self.score = ""  # of the last validation

    def validated(self, score: str) -> None:
        self.score = f"  validation {score}"

    def work(self, what: str, done: float, total: float, left: float) -> None:
        """What is going on, how much of it is done, and the seconds that the whole run has left."""
        self.left = left
        if what == "meta-training":  # its record follows
            return
        share = done / total if total else 1.0
        if self.bar is not None and self.task is not None:
            figures = f"{100 * share:.0f} %"
            self.bar.update(
                self.task, description=what, completed=share, total=1, figures=figures, left=self._left()
            )
            return
        now = self.clock()
        if not done:
            self.told = now
            if what != "validating":
                self.say(f"{what}: {self._left()}")
        elif now - self.told >= EVERY:
            self.told = now
            self.say(f"{what}: {100 * share:.0f} %, {self._left()}")

    def __call__(self, record: Record, seconds: float) -> None:
        figures = self.figures(record, seconds)
        done, total = record.iteration, self.settings.iterations
        if self.settings.seconds:
            done, total = int(seconds), int(self.settings.seconds)
        if self.left is None:
            self.left = seconds * (total / max(1, done) - 1)
        unit = "second" if self.settings.seconds else "iteration"
        if self.bar is not None and self.task is not None:
            shown = f"{unit} {done}/{total}  {figures}{self.score}"
            self.bar.update(
                self.task,
                description="meta-training",
                completed=done,
                total=total,
                figures=shown,
                left=self._left(),
                refresh=done == total,  # a short run can end between two of the bar's own
            )
            return
        tenth = 10 * done // max(1, total)
        if tenth > self.printed:
            self.printed = tenth
            self.say(f"{unit} {done}/{total}  {figures}  {self._left()}")

    def _left(self) -> str:
        return f"{duration(self.left if self.left is not None else math.nan)} left"

    def figures(self, record: Record, seconds: float) -> str:
        assert record.before is not None and record.after is not None  # a measured record
        before, after = record.before.item(), record.after.item()
        metric = headline(self.settings)
        digits = 0 if metric.unit == "%" else 2
        numbers = " → ".join(f"{metric.scale * score:.{digits}f}" for score in (before, after))
        moved = f"query {metric.name} {numbers} {metric.unit}".rstrip()
        speed = record.iteration * self.settings.meta_batch_size / seconds
        return f"meta-loss {record.meta_loss.item():.3f}  {moved}  {speed:.0f} tasks/s"
