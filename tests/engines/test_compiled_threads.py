"""compile=True on several threads: tasks side by side, and stacks whose kernels share them out."""

from threading import Barrier, Event, Lock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiling import SMALL_CONV4, SMALL_MLP, assert_current, made
from family import LR
from fomaml.engines import adapter, meta_gradient
from fomaml.engines.compiled import cache, trace
from fomaml.engines.cpu import kernels
from fomaml.engines.cpu.threads import one_by_one, side_by_side
from fomaml.engines.plan import _at_once
from fomaml.learning.algorithms import FOMAML
from fomaml.models import Conv4
from zoo import draw

LIMIT = 600  # seconds, of a fault: what is waited for happens, however busy the machine is


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_side_by_side_keeps_the_order_and_the_number_of_threads(threads):
    torch.set_num_threads(threads)
    try:
        lock, now, most, seen, drawn = Lock(), 0, 0, set(), []
        all_at_once, second_done = Barrier(threads), Event()

        def work(i):
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
                seen.add(torch.get_num_threads())
            if i < threads:
                all_at_once.wait(timeout=LIMIT)
            if i == 0 and threads > 1:  # the first is the last to end
                assert second_done.wait(LIMIT)
            if i == 1:
                second_done.set()
            with lock:
                now -= 1
            return i * i

        def items():
            for i in range(20):
                drawn.append(i)
                yield i

        ahead = []
        found = []
        for result in side_by_side(work, items()):
            found.append(result)
            ahead.append(len(drawn) - len(found))
        assert found == [i * i for i in range(20)]
        assert most == threads
        assert max(ahead) <= threads  # what waits holds its memory
        assert seen == {1}
        assert torch.get_num_threads() == threads
        large = torch.randn(300, 300)
        torch.testing.assert_close(
            large @ large, (large.double() @ large.double()).float(), rtol=1e-3, atol=1e-3
        )
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_side_by_side_of_few_items(number, two_threads):
    assert list(side_by_side(str, range(number))) == [str(i) for i in range(number)]


def test_side_by_side_raises_what_the_function_raised_and_goes_on_afterwards(two_threads):
    begun, ended = [], []

    def work(i):
        begun.append(i)
        if i == 3:
            raise ValueError("three")
        ended.append(i)
        return i

    found = []
    with pytest.raises(ValueError, match="three"):
        for result in side_by_side(work, range(50)):
            found.append(result)
    assert found == [0, 1, 2]
    before = len(ended)
    assert {*begun} == {*ended, 3} and before <= 7  # nothing runs on
    # what was given up does not begin either: the same two threads have had other work since
    assert list(side_by_side(str, range(8))) == [*map(str, range(8))]
    assert len(ended) == before
    assert torch.get_num_threads() == 2
    assert list(side_by_side(work, range(2))) == [0, 1]


def test_the_caller_has_one_thread_while_tasks_run(two_threads):
    """What it does between two results must not wake helpers that spin on the cores of the tasks."""
    results = side_by_side(str, range(3))
    assert [torch.get_num_threads() for _ in results] == [1, 1, 1]
    assert torch.get_num_threads() == 2
    results = side_by_side(str, range(3))
    next(results)
    results.close()  # left alone half way
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("hands", [1, 2])
def test_stacks_one_by_one(hands, two_threads):
    memory, threads = kernels.Memory(), []

    def work(i):
        threads.append((torch.get_num_threads(), kernels._own.threads, kernels._own.memory))
        if i == 3:
            raise ValueError("three")
        return i

    results = one_by_one(work, range(3), memory, hands)
    assert [(i, torch.get_num_threads()) for i in results] == [(0, 1), (1, 1), (2, 1)]
    assert threads == [(1, hands, memory)] * 3
    assert torch.get_num_threads() == 2 and kernels._own.memory is None
    results = one_by_one(work, range(9), memory, hands)
    next(results)
    results.close()  # left alone half way
    assert torch.get_num_threads() == 2 and kernels._own.memory is None
    with pytest.raises(ValueError, match="three"):
        list(one_by_one(work, range(9), memory, hands))
    assert torch.get_num_threads() == 2 and kernels._own.memory is None


@pytest.mark.parametrize(
    ("model", "engine", "at_once"),
    [
        *((SMALL_CONV4, engine, at_once) for engine in ("loop", "batched") for at_once in (1, 5)),
        # through torch's compiler, which takes seconds for each
        pytest.param(SMALL_MLP, "loop", 1, marks=pytest.mark.long),
        (SMALL_MLP, "batched", 1),
        pytest.param(SMALL_MLP, "factored", 1, marks=pytest.mark.long),
    ],
)
def test_one_thread_and_two_give_the_same_bits(model, engine, at_once):
    make, shape = model
    tasks = draw(shape, F.cross_entropy, tasks=5).to(dtype=torch.float32)
    learner = FOMAML(make(), 0.1, 2)
    one = meta_gradient(learner, tasks, engine=engine, tasks_at_once=at_once, compile=True)
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            two = meta_gradient(learner, tasks, engine=engine, tasks_at_once=at_once, compile=True)
            assert all(torch.equal(one.gradients[n], two.gradients[n]) for n in one.gradients)
            assert all(torch.equal(a, b) for a, b in zip(one[1:4], two[1:4]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert made(learner) == 1


def test_chunks_of_dense_layers_are_computed_side_by_side(two_threads, monkeypatch):
    """Each on one thread, and both at the same time."""
    make, shape = SMALL_MLP
    tasks = draw(shape, F.cross_entropy, tasks=6)
    learner = FOMAML(make().double(), LR, 1)
    meta_gradient(learner, tasks, engine="batched", tasks_at_once=3, compile=True)
    function = next(iter(cache._watched[learner].known.values())).function
    both, threads, run = Barrier(2), [], function._run

    def watched(*arguments):
        both.wait(timeout=LIMIT)
        threads.append(torch.get_num_threads())
        return run(*arguments)

    monkeypatch.setattr(function, "_run", watched)
    assert_current(learner, tasks, engine="batched", tasks_at_once=3)
    assert threads == [1, 1]


@pytest.mark.parametrize(("few", "threads"), [(trace.FEW_OPERATIONS, 1), (0, 2)])
def test_a_function_of_few_operations_runs_on_one_thread(few, threads, two_threads, monkeypatch):
    monkeypatch.setattr(trace, "FEW_OPERATIONS", few)
    make, shape = SMALL_MLP
    tasks = draw(shape, F.cross_entropy, tasks=6)
    learner = FOMAML(make().double(), LR, 1)
    meta_gradient(learner, tasks, engine="batched", compile=True)
    function = next(iter(cache._watched[learner].known.values())).function
    seen, run = [], function._run
    monkeypatch.setattr(function, "_run", lambda *args: (seen.append(torch.get_num_threads()), run(*args))[1])
    assert_current(learner, tasks, engine="batched")
    assert seen == [threads] and torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("tasks", "engine", "hidden", "threads", "size"),
    [
        (32, "batched", 700, 1, 8),
        (30, "batched", 700, 1, 6),
        (31, "batched", 700, 1, 31),
        (12, "batched", 700, 2, 6),
        (32, "batched", 700, 9, 32),
        (32, "batched", 3000, 1, 4),
        (30, "batched", 3000, 1, 3),
        (32, "batched", 20, 1, 32),
        (32, "factored", 3000, 1, 32),
        (32, "factored", 20_000, 2, 16),
        (32, "factored", 20_000, 3, 8),
    ],
)
def test_large_dense_tasks_are_compiled_for_few_at_once(tasks, engine, hidden, threads, size):
    model = nn.Sequential(nn.Linear(36, hidden), nn.ReLU(), nn.Linear(hidden, 4)).double()
    learner = FOMAML(model, LR, 1)
    drawn = draw((36,), F.cross_entropy, tasks=tasks)
    if hidden == 700:  # few parameters and many operations
        drawn = drawn.map(lambda tensor: tensor.repeat_interleave(4, 1))
    torch.set_num_threads(threads)
    try:
        assert _at_once(learner, drawn, tasks, engine, None, compile=True) == size
    finally:
        torch.set_num_threads(1)
    assert _at_once(learner, drawn, tasks, engine, None, compile=False) == tasks
    assert _at_once(learner, drawn, tasks, engine, 3, compile=True) == 3


@pytest.mark.parametrize(("side", "hands"), [(16, 1), (40, 2)])
def test_a_small_task_alone_keeps_to_one_thread(side, hands, two_threads, monkeypatch):
    """For what several give it, it would keep each of them busy with waiting."""
    asked = []
    share = kernels.sharing
    monkeypatch.setattr(
        kernels, "sharing", lambda threads, memory: asked.append(threads) or share(threads, memory)
    )
    learner = FOMAML(Conv4(3, channels=64, image=(1, side, side)), 0.1, 1)
    support = (
        draw((1, side, side), F.cross_entropy, ways=3).to(dtype=torch.float32).map(lambda t: t[0]).support
    )
    adapter(learner, support)(support)
    assert set(asked) == {hands}
