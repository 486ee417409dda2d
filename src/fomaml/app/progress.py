"""What a person sees of a run that is trained: a live bar on a terminal, a plain line at every tenth elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fomaml.app.report import duration
from fomaml.app.settings import Settings
from fomaml.app.sources import source_of
from fomaml.train import Record


@contextlib.contextmanager
def watching(settings: Settings, stream) -> Iterator[Watch]:
    """Shows a run's progress on a stream."""
    console = Console(file=stream)
    if not console.is_terminal:
        yield Watch(settings, lambda line: print(line, file=stream, flush=True))
        return
    columns = (
        TextColumn("meta-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=settings.seconds or settings.iterations, figures="")
        yield Watch(settings, bar.console.print, bar, task)


class Watch:
    """Receives the measured records of a run; `say` prints a line."""

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None],
        bar: Progress | None = None,
        task: TaskID | None = None,
    ):
        self.settings, self.say, self.bar, self.task = settings, say, bar, task
        self.printed = 0

    def __call__(self, record: Record, seconds: float) -> None:
        figures = self.figures(record, seconds)
        done, total = record.iteration, self.settings.iterations
        if self.settings.seconds:
            done, total = int(seconds), int(self.settings.seconds)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, figures=figures)
            return
        tenth = 10 * done // max(1, total)
        if tenth > self.printed:
            self.printed = tenth
            left = seconds * (total / done - 1)
            unit = "second" if self.settings.seconds else "iteration"
            self.say(f"{unit} {done}/{total}  {figures}  {duration(left)} left")

    def figures(self, record: Record, seconds: float) -> str:
        assert record.before is not None and record.after is not None  # a measured record
        before, after = record.before.item(), record.after.item()
        metric = source_of(self.settings).metric
        digits = 0 if metric.unit == "%" else 2
        numbers = " → ".join(f"{metric.scale * score:.{digits}f}" for score in (before, after))
        moved = f"query {metric.name} {numbers} {metric.unit}".rstrip()
        speed = record.iteration * self.settings.meta_batch_size / seconds
        return f"meta-loss {record.meta_loss.item():.3f}  {moved}  {speed:.0f} tasks/s"
