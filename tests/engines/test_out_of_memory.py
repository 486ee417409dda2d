"""Out of memory: half as many tasks at once, and no other error is taken for it."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import reference
from compiling import slow_answer, untouched
from family import LR, assert_agrees
from fomaml.engines import meta_gradient
from fomaml.engines.plan import ENGINES
from fomaml.errors import InputError
from fomaml.learning.algorithms import FOMAML
from zoo import draw, example

MESSAGES = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
}


def limited(monkeypatch, engine, most, error):
    """Chunks of more than `most` tasks raise the error. Returns the list of the sizes that were tried."""
    tried, problem = [], ENGINES[engine]

    def guarded(learner, chunk, **facts):
        tried.append(len(chunk.support.targets))
        if tried[-1] > most:
            raise error
        return problem(learner, chunk, **facts)

    monkeypatch.setitem(ENGINES, engine, guarded)
    return tried


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("engine", ["batched", "factored"])
def test_out_of_memory_halves_the_tasks_at_once(engine, kind, monkeypatch):
    model, _, criterion = example("mlp")
    tasks = draw((36,), F.cross_entropy, tasks=7)
    expected = slow_answer(reference.fomaml, model, tasks)
    tried = limited(monkeypatch, engine, 2, MESSAGES[kind])
    learner = FOMAML(model, LR, 2, criterion)
    with pytest.warns(RuntimeWarning) as warned:
        result = meta_gradient(learner, tasks, engine=engine)
    assert [str(w.message) for w in warned] == [
        f"out of memory: {n} tasks at once from now on" for n in (4, 2)
    ]
    assert {w.filename for w in warned} == {__file__}
    assert_agrees(result, expected, 1e-10)
    assert tried == [7, 4, 2, 2, 2, 1]
    tried.clear()
    assert_agrees(
        meta_gradient(learner, tasks, engine=engine), expected, 1e-10
    )  # remembered: no warning, an error
    assert tried == [2, 2, 2, 1]
    tried.clear()
    meta_gradient(learner, tasks, engine=engine, tasks_at_once=1)
    assert tried == [1] * 7
    tried.clear()
    with pytest.warns(RuntimeWarning):
        meta_gradient(FOMAML(model, LR, 2, criterion), tasks, engine=engine, tasks_at_once=3)
    assert tried == [3, 2, 2, 2, 1]


def test_out_of_memory_when_compiled(monkeypatch):
    untouched(monkeypatch)
    model, _, criterion = example("mlp")
    tasks = draw((36,), F.cross_entropy, tasks=6)
    limited(monkeypatch, "batched", 2, MESSAGES["gpu"])
    learner = FOMAML(model, LR, 2, criterion)
    with pytest.warns(RuntimeWarning) as warned:
        result = meta_gradient(learner, tasks, engine="batched", compile=True)
    assert [str(w.message) for w in warned] == [
        f"out of memory: {n} tasks at once from now on" for n in (3, 2)
    ]
    expected = slow_answer(reference.fomaml, model, tasks)
    assert_agrees(result, expected, 1e-10)
    again = meta_gradient(learner, tasks, engine="batched", compile=True)
    assert_agrees(again, expected, 1e-10)  # remembered: no warning, an error


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_a_single_task_out_of_memory_raises(engine, monkeypatch):
    model, tasks, criterion = example("mlp")
    limited(monkeypatch, engine, 0, MESSAGES["gpu"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch.OutOfMemoryError):
            meta_gradient(FOMAML(model, LR, 2, criterion), tasks, engine=engine)


@pytest.mark.parametrize(
    "error", [RuntimeError("no such thing"), IndexError("no such thing"), KeyError("thing")]
)
def test_other_errors_are_not_swallowed(error, monkeypatch):
    model, tasks, criterion = example("mlp")
    tried = limited(monkeypatch, "batched", 2, error)
    for tasks_at_once in (None, 3):
        with pytest.raises(InputError, match=r"engine='batched' does not take this module.*thing") as raised:
            meta_gradient(
                FOMAML(model, LR, 2, criterion), tasks, engine="batched", tasks_at_once=tasks_at_once
            )
        assert raised.value.__cause__ is error
    assert tried == [3, 3]
