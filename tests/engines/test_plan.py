"""The plan as an object: what it computes, what it says, and that it halves its tasks at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from family import LR, STEPS
from fomaml.engines import ENGINES, choose, curve, curve_at, meta_gradient, plan
from fomaml.errors import InputError
from fomaml.learning.algorithms import FOMAML
from fomaml.models import MLP
from fomaml.tasks import Examples
from zoo import draw


def wide():
    torch.manual_seed(1)
    return FOMAML(MLP(256, 128, 4).double(), LR, STEPS), draw((256,), F.cross_entropy)


def small(tasks=3):
    torch.manual_seed(1)
    return FOMAML(MLP(6, 8, 4).double(), LR, STEPS), draw((6,), F.cross_entropy, tasks=tasks)


@pytest.mark.parametrize("engine", ["auto", "loop", "batched", "factored"])
def test_a_plan_computes_what_the_short_forms_do(engine):
    learner, tasks = wide()
    own = plan(learner, tasks, engine=engine)
    points = [(0, "own"), (1, "support"), (1, "own"), (4, "own")]
    for batch in (tasks, tasks.map(lambda tensor: tensor[:2]), tasks.map(lambda t: torch.cat([t, t]))):
        found, expected = own(batch), meta_gradient(learner, batch, engine=own.engine, tasks_at_once=3)
        assert found.engine == own.engine == expected.engine
        assert all(torch.equal(found.gradients[name], value) for name, value in expected.gradients.items())
        assert all(map(torch.equal, found[1:4], expected[1:4]))
        expected = curve_at(learner, batch, points, own.engine, tasks_at_once=3)
        for ours, theirs in zip(own.curve(batch, points), expected, strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_a_plan_says_what_it_is_and_why():
    learner, tasks = wide()
    own = plan(learner, tasks)
    assert (own.engine, own.why) == choose(learner, tasks)
    assert own.why == "linear layers much wider than the 8 vectors of a support set"
    asked = plan(learner, tasks, engine="batched", tasks_at_once=2)
    assert (asked.engine, asked.why, asked.tasks_at_once) == ("batched", "as asked", 2)
    assert plan(learner, tasks, engine="loop", tasks_at_once=2).tasks_at_once == 1


def test_a_look_at_the_query_set_leaves_the_path_as_it_is():
    """Of a module that writes into a buffer."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, inputs):
            self.calls += 1
            return self.head(inputs) * self.calls

    learner, tasks = FOMAML(Counting().double(), LR, 1), draw((6,), F.cross_entropy)
    for engine in ENGINES:
        own = plan(learner, tasks, engine=engine)
        *_, (_, often) = own.curve(tasks, [(0, "own"), (1, "own"), (1, "own"), (3, "own")])
        [(_, once)] = own.curve(tasks, [(3, "own")])
        torch.testing.assert_close(often, once, rtol=1e-12, atol=1e-12)


# --- out of memory --------------------------------------------------------------------------------


@pytest.fixture
def two_at_once(monkeypatch):
    """An engine with memory for two tasks; the list of the numbers it was asked for."""
    tried, problem = [], ENGINES["batched"]

    def guarded(learner, chunk, **facts):
        tried.append(len(chunk.support.targets))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return problem(learner, chunk, **facts)

    monkeypatch.setitem(ENGINES, "batched", guarded)
    return tried


def computed(own, tasks):
    return own(tasks)


def looked_at(own, tasks):
    return own.curve(tasks, [(0, "own"), (1, "own")])


@pytest.mark.parametrize("call", [computed, looked_at])
def test_a_plan_halves_its_tasks_at_once_and_hands_them_on(call, two_at_once):
    learner, tasks = small(tasks=7)
    own = plan(learner, tasks, engine="batched")
    with pytest.warns(RuntimeWarning) as warned:
        call(own, tasks)
    assert [str(w.message) for w in warned] == [
        f"out of memory: {n} tasks at once from now on" for n in (4, 2)
    ]
    assert {w.filename for w in warned} == {__file__}
    assert own.tasks_at_once == 2
    two_at_once.clear()
    call(own, tasks)
    assert two_at_once == [2, 2, 2, 1]
    handed_on = plan(learner, tasks, engine="batched", tasks_at_once=own.tasks_at_once)
    two_at_once.clear()
    call(handed_on, tasks)
    assert two_at_once == [2, 2, 2, 1]
    assert plan(learner, tasks, engine="batched").tasks_at_once == 7  # another plan knows nothing of it


def test_the_short_forms_keep_what_fitted_for_the_same_arguments(two_at_once):
    learner, tasks = small(tasks=4)
    with pytest.warns(RuntimeWarning, match="out of memory: 2 tasks at once from now on") as warned:
        meta_gradient(learner, tasks, engine="batched")
    assert {w.filename for w in warned} == {__file__}
    two_at_once.clear()
    curve(learner, tasks, [0], engine="batched")
    meta_gradient(learner, tasks, engine="batched")
    assert two_at_once == [2, 2, 2, 2]
    with pytest.warns(RuntimeWarning, match="out of memory: 2 tasks at once from now on") as warned:
        curve_at(FOMAML(learner.model, LR, 1), tasks, [(0, "own")], engine="batched")
    assert {w.filename for w in warned} == {__file__}
    assert plan(learner, tasks, engine="batched").tasks_at_once == 4


def test_a_plan_refuses_what_meta_gradient_refuses():
    learner, tasks = small()
    with pytest.raises(
        InputError, match=r"^unknown engine 'fast'; there are: auto, loop, batched, factored$"
    ):
        plan(learner, tasks, engine="fast")
    with pytest.raises(InputError, match=r"^tasks_at_once must be a whole number of 1 or more, got 0$"):
        plan(learner, tasks, tasks_at_once=0)
    wide_labels = tasks._replace(query=Examples(tasks.query.inputs, tasks.query.targets + 4))
    with pytest.raises(InputError, match="too narrow for 8 ways"):
        plan(learner, wide_labels)(wide_labels)
