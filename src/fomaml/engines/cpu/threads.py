"""Tasks side by side on a CPU: each on a thread of its own beats all threads on one task, which wait for each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from itertools import chain, islice

import torch

from fomaml.blocks import Memory
from fomaml.threads import pool_of


def on_one_thread(function: Callable, items: Iterable) -> Iterator:
    """`map(function, items)`, torch's own operators with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from map(function, items)
    finally:
        torch.set_num_threads(threads)


def one_by_one(function: Callable, items: Iterable, memory: Memory, threads: int) -> Iterator:
    """`map(function, items)`, each a stack of tasks whose kernels use so many threads.

    Between kernels the interpreter runs once, not on all threads in turns. torch's own operators have one thread, as
    below.
    """
    from fomaml.engines.cpu import kernels  # which only what is compiled needs

    with kernels.sharing(threads, memory):
        yield from on_one_thread(function, items)


def side_by_side(function: Callable, items: Iterable) -> Iterator:
    """`map(function, items)`, at most as many at a time as torch has threads, each with one thread.

    function: must release the interpreter's lock for most of its time, as torch's operators do.

    Until the last result is taken the caller's own operators have one thread too: OpenMP's helpers go on spinning for
    milliseconds after an operator that used them, and took half of the cores from the tasks.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(function, items)
        return
    pool = pool_of(threads)
    under_way: deque = deque()
    items = iter(items)
    first = [*islice(items, threads + 1)]
    # of as many as there are threads, one that this thread computes itself, sooner than another wakes up
    own = [first.pop()] if 1 < len(first) <= threads else []
    torch.set_num_threads(1)
    try:
        for item in chain(first, items):
            under_way.append(pool.submit(function, item))
            if len(under_way) > threads:
                yield under_way.popleft().result()
        done = [*map(function, own)]
        while under_way:
            yield under_way.popleft().result()
        yield from done
    finally:  # after an error nothing runs on, and nothing holds memory
        wait([future for future in under_way if not future.cancel()])
        torch.set_num_threads(threads)
