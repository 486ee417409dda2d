"""Work on one thread: of torch's operators between two calls that compute on many, and aside."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
