"""Out of memory: half as many tasks at once, and no other error is taken for it."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from compiling import slow_answer, untouched
from family import LR, assert_agrees
from fomaml.baselines import nearest_centroid
from fomaml.engines import meta_gradient, plan
from fomaml.engines.plan import ENGINES
from fomaml.engines.probes import flops, try_once
from fomaml.errors import InputError
from fomaml.evaluate import evaluate
from fomaml.learning.algorithms import FOMAML
from fomaml.metrics import Metric
from fomaml.tasks import Examples, Task
from zoo import draw, example

MESSAGES = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
}
OTHERS = {
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1.00 GB)"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you"
    ),
    "numpy": MemoryError("Unable to allocate 3.00 GiB"),
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


@pytest.mark.parametrize(
    ("engine", "kind"),
    [*itertools.product(["batched", "factored"], MESSAGES), *itertools.product(["batched"], OTHERS)],
)
def test_out_of_memory_halves_the_tasks_at_once(engine, kind, monkeypatch):
    model, _, criterion = example("mlp")
    tasks = draw((36,), F.cross_entropy, tasks=7)
    expected = slow_answer(reference.fomaml, model, tasks)
    tried = limited(monkeypatch, engine, 2, {**MESSAGES, **OTHERS}[kind])
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


class Large(nn.Linear):
    """A layer for which a device has memory for so many tasks at once, and no more. stacks: those that were tried."""

    def __init__(self, most: int):
        super().__init__(4, 3)
        self.most, self.stacks = most, []

    def forward(self, inputs):
        if torch._C._functorch.is_batchedtensor(inputs):
            self.stacks.append(len(torch._C._functorch.get_unwrapped(inputs)))
            if self.stacks[-1] > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(inputs)


def some_tasks(tasks: int = 5) -> Task:
    labels = (torch.arange(6) % 3).expand(tasks, 6)
    return Task(*(Examples(torch.randn(tasks, 6, 4), labels) for _ in range(2)))


def test_a_probe_without_memory_says_nothing_of_the_module():
    """Two tasks do not fit, one does: the engine is the one that it would be, with a task at a time."""
    tasks = some_tasks()
    learner = FOMAML(Large(1), 0.1, 1)
    own = plan(learner, tasks)
    assert own.engine == plan(FOMAML(Large(9), 0.1, 1), tasks).engine == "batched"
    with pytest.warns(RuntimeWarning):
        found = own(tasks)
    assert own.tasks_at_once == 1
    expected = meta_gradient(learner, tasks, engine="loop")
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient)
    with pytest.raises(torch.OutOfMemoryError):
        plan(FOMAML(Large(0), 0.1, 1), tasks)


@pytest.mark.parametrize("probe", [flops, try_once])
def test_a_single_task_that_does_not_fit_is_no_count_and_no_pass(probe):
    def none_left(outputs, targets):
        raise MESSAGES["gpu"]

    with pytest.raises(torch.OutOfMemoryError):
        probe(FOMAML(nn.Linear(4, 3), 0.1, 1, none_left), some_tasks())


class Drawn:
    """Tasks of which only so many can be drawn at once. drawn: how many were asked for."""

    ways, copies = 3, 1

    def __init__(self, most: int = 99):
        self.most, self.drawn = most, []

    def batch(self, start: int, tasks: int) -> Task:
        self.drawn.append(tasks)
        if tasks > self.most:
            raise MESSAGES["gpu"]
        torch.manual_seed(0)
        return some_tasks(12).map(lambda tensor: tensor[start : start + tasks])


def scored(most: int):
    def score(outputs, targets, losses):
        if len(outputs) > most:
            raise MESSAGES["gpu"]
        return losses

    return Metric("of few at once", score, 1, "")


EVALUATIONS = {
    "adaptation": (lambda e, most, scorer: evaluate(FOMAML(Large(most), 0.1, 1), e, tasks=11, at_steps=1), 99),
    "drawing": (lambda e, most, scorer: evaluate(FOMAML(nn.Linear(4, 3), 0.1, 1), e, tasks=11, at_steps=1), 3),
    "scoring": (
        lambda e, most, scorer: evaluate(FOMAML(nn.Linear(4, 3), 0.1, 1), e, tasks=11, at_steps=1, metric=scorer), 99,
    ),
    "drawing for the nearest centroid": (lambda e, most, scorer: nearest_centroid(e, tasks=11), 3),
}  # fmt: skip


@pytest.mark.parametrize("what", EVALUATIONS)
def test_evaluation_goes_on_with_fewer_tasks_at_once(what):
    """Hours of training do not end with the memory of their last minute."""
    run, most = EVALUATIONS[what]
    torch.manual_seed(1)
    expected = run(Drawn(), 99, scored(99))
    torch.manual_seed(1)
    limited = Drawn(most)
    with pytest.warns(RuntimeWarning) as warned:
        found = run(limited, 3, scored(3))
    assert [str(each.message) for each in warned] == [
        f"out of memory: {n} tasks at once from now on" for n in (6, 3)
    ]
    same = lambda found: found if isinstance(found, torch.Tensor) else found[1]  # noqa: E731
    torch.testing.assert_close(same(found), same(expected))
    if most == 3:
        assert limited.drawn[-6:] == [11, 6, 3, 3, 3, 2]


def test_another_error_while_drawing_is_raised_at_once():
    class Broken(Drawn):
        def batch(self, start, tasks):
            super().batch(start, tasks)
            raise RuntimeError("no such file")

    broken = Broken()
    with pytest.raises(RuntimeError, match="no such file"):
        nearest_centroid(broken, tasks=11)
    assert broken.drawn == [11]
