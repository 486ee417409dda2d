"""Work on one thread: of torch's operators between two calls that compute on many, and aside; and on several."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch


@contextmanager
def alone(really: bool = True) -> Iterator[None]:
    """Within it torch's own operators have one thread, if `really`; for what stands between calls that use many."""
    threads = torch.get_num_threads()
    if really and threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if really and threads > 1:
            torch.set_num_threads(threads)


@functools.cache
def pool_of(threads: int) -> ThreadPoolExecutor:
    """A pool whose every thread computes alone."""
    before = torch.get_num_threads()
    together = threading.Barrier(threads + 1)

    def begin():
        torch.get_num_threads()  # a thread's first question sets its number to that of all: ask before setting it
        torch.set_num_threads(1)  # of this thread, and of those to come: set back below
        together.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="fomaml", initializer=begin)
    for _ in range(threads):
        pool.submit(int)
    together.wait()
    torch.set_num_threads(before)
    return pool


_own = threading.local()


@contextmanager
def spread(threads: int) -> Iterator[None]:
    """Within it `in_parts` uses so many threads where this thread calls it."""
    before = getattr(_own, "threads", 1)
    _own.threads = threads
    try:
        yield
    finally:
        _own.threads = before


def in_parts(work: Callable[[slice], object], number: int) -> None:
    """Do work that is made of so many pieces, on as many threads as `spread` has set; work(slice) does some of them.

    The threads are this one and those of `pool_of`, which then compute with what they have written: it lies in their
    cores' caches.
    """
    threads = getattr(_own, "threads", 1)
    if threads == 1:
        work(slice(number))
        return
    bounds = [number * part // threads for part in range(threads + 1)]
    *others, last = itertools.starmap(slice, itertools.pairwise(bounds))
    futures = [pool_of(threads).submit(work, each) for each in others]
    try:
        work(last)
    finally:
        wait(futures)
    for future in futures:
        future.result()
