"""Tasks that are drawn while those before them are computed with, or many at a time where they are small."""

from __future__ import annotations

from concurrent.futures import Future

import torch

from fomaml.blocks import Memory, kept_in
from fomaml.draws import Numbers
from fomaml.episodes import Episodes, RegressionEpisodes, TaskSequence, copies_of, ways_of
from fomaml.tasks import Batch, Task, tensors_of
from fomaml.threads import alone, pool_of, spread

LARGE = 2**28  # bytes: a batch of more is not kept beside the present one
SMALL = 2**18  # bytes: so many are drawn at a time
AT_ONCE = 16  # batches, at most


class Ahead(TaskSequence):
    """The tasks of a sequence that is asked for batches in equal strides.

    stride: from one batch to the next. stop: none from this task on is drawn before it is asked for.

    Tasks of `Episodes` are functions of their index alone, and so the same ones. What drawing them raises is raised
    when the batch is asked for. Of other sequences nothing is known, and nothing is drawn before its time.
    """

    def __init__(self, episodes: TaskSequence, stride: int, stop: int):
        self.episodes, self.stride, self.stop = episodes, stride, stop
        self._aside = False
        self._many = type(episodes) is RegressionEpisodes
        if type(episodes) is Episodes and episodes.draws_aside:
            self._many = True
            # what lies ready in a CPU's memory is sooner gathered by all cores than by one that has to compute
            self._aside = not episodes.only_gathers
        self._drawn: dict[tuple[int, int], Future[Batch]] = {}
        self._block: tuple[range, Task] | None = None
        self._numbers: tuple[range, Numbers] | None = None
        self._memory = Memory()
        # aside there is one: others have to compute, and what they are given waits until they have done so
        self._threads = 1 if self._aside else torch.get_num_threads()

    @property
    def ways(self) -> int | None:
        return ways_of(self.episodes)

    @property
    def copies(self) -> int:
        return copies_of(self.episodes)

    @property
    def complete(self) -> bool:
        return getattr(self.episodes, "complete", False)

    def batch(self, start: int, tasks: int) -> Batch:
        """Tasks start … start + tasks - 1."""
        if self._block is not None:
            own, block = self._block
            if start in own and start + tasks <= own.stop:
                rows = slice(start - own.start, start - own.start + tasks)
                return block.map(lambda tensor: tensor[rows])
        future = self._drawn.pop((start, tasks), None)
        with alone():
            batch = self._draw(start, tasks) if future is None else future.result()
        if self._many and isinstance(batch, Task):
            self._look_ahead(start + self.stride, tasks, sum(tensor.nbytes for tensor in tensors_of(batch)))
        return batch

    def _look_ahead(self, following: int, tasks: int, size: int) -> None:
        if size * AT_ONCE <= SMALL and tasks == self.stride:
            number = min(AT_ONCE * tasks, self.stop - following)
            if number > tasks:
                block = self._draw(following, number)
                if isinstance(block, Task):
                    self._block = range(following, following + number), block
        elif self._aside and size <= LARGE and following + tasks <= self.stop:
            self._drawn[following, tasks] = pool_of(1).submit(self._draw, following, tasks)

    def _draw(self, start: int, tasks: int) -> Batch:
        with kept_in(self._memory), spread(self._threads):
            if type(self.episodes) is Episodes:
                return self.episodes.taken(self._numbers_of(self.episodes, start, tasks), start)
            return self.episodes.batch(start, tasks)

    def _numbers_of(self, episodes: Episodes, start: int, tasks: int) -> Numbers:
        """Those of tasks start … start + tasks - 1, drawn for many batches at a time: a third of the time."""
        if tasks != self.stride:
            return episodes.numbers(start, tasks)
        batches = 1
        if self._numbers is not None:
            own, numbers = self._numbers
            if start in own and start + tasks <= own.stop:
                return numbers.part(slice(start - own.start, start - own.start + tasks))
            batches = min(AT_ONCE, SMALL * len(own) // (numbers.nbytes * tasks))
        number = max(tasks, min(batches * tasks, self.stop - start))
        numbers = episodes.numbers(start, number)
        self._numbers = range(start, start + number), numbers
        return numbers.part(slice(0, tasks))
