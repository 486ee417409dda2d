"""compile=True traces without data: nothing of the first tasks is built in."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from family import LR, assert_agrees
from fomaml.engines import meta_gradient, plan
from fomaml.engines.compiled import cache, trust
from fomaml.engines.compiled.trace import _in_few_variables
from fomaml.learning.algorithms import FOMAML
from zoo import draw, example

HAS_DATA: list[bool] = []


class Watching(nn.Module):
    """Notes whether its inputs have data."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 8)
        self.scale = torch.full((4,), 2.0, dtype=torch.float64)  # no buffer: a constant of the trace

    def forward(self, inputs):
        HAS_DATA.append(not isinstance(inputs, FakeTensor))
        return self.conv(inputs).flatten(1) * self.scale


def test_a_trace_holds_no_data(monkeypatch):
    monkeypatch.setattr(trust, "compare", lambda *arguments: "")  # which runs the engine itself
    learner, tasks = FOMAML(Watching().double(), LR, 3), draw((2, 8, 8), F.cross_entropy)
    own = plan(learner, tasks, engine="loop", compile=True)  # tries the learner on a task
    HAS_DATA.clear()
    found = own(tasks)
    assert HAS_DATA and not any(HAS_DATA)
    assert_agrees(found, meta_gradient(learner, tasks, engine="loop"), 1e-10)


@pytest.mark.parametrize(
    ("depends", "reason"),
    [
        (lambda inputs: inputs[inputs[:, 0] > 0].mean(0), r"nonzero.*depends on values"),
        (lambda inputs: float(inputs.detach().numpy().std()), r"numpy"),
        (lambda inputs: inputs.sum().item(), r"depends on values|data-dependent"),
    ],
)
def test_what_depends_on_values_runs_uncompiled(depends, reason):
    """It must not be built in as it was for the first tasks."""

    class Depends(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, inputs):
            return self.layer(inputs * depends(inputs))

    learner = FOMAML(Depends().double(), LR, 2)
    with pytest.warns(RuntimeWarning, match=f"compile=True runs uncompiled: .*{reason}"):
        meta_gradient(learner, draw((6,), F.cross_entropy), engine="loop", compile=True)
    tasks = draw((6,), F.cross_entropy)
    found = meta_gradient(learner, tasks, engine="loop", compile=True)
    assert_agrees(found, meta_gradient(learner, tasks, engine="loop"), 1e-10)


def test_a_traced_function_has_as_many_variables_as_hold_something_at_a_time():
    source = """
def forward(self, a_1, b_1):
    c = self.constant
    d = f(a_1, b_1);  a_1 = None
    e = g(d, c = c);  d = c = None
    h = f(e, b_1)
    i = f(h, 2);  h = None
    return [i, e, b_1]
"""
    module = _in_few_variables(source)
    names = {"f": lambda x, y: 3 * x + y, "g": lambda d, c: d - c * c}
    plain = dict(names)
    exec(compile(module, "few", "exec"), names)
    exec(source, plain)
    of = SimpleNamespace(constant=7)
    assert names["forward"](of, 5, 11) == plain["forward"](of, 5, 11) == [-172, -23, 11]
    few, many = (each["forward"].__code__.co_nlocals for each in (names, plain))
    assert (few, many) == (5, 8)


def test_what_is_traced_of_many_steps_fits_a_piece_of_the_stack():
    """512 words, of 2048: Python maps a new piece for each call from where the one before is full."""
    model, tasks, criterion = example("conv4-strided")
    learner = FOMAML(model, LR, 10, criterion)
    plan(learner, tasks, engine="loop", compile=True)(tasks)
    [function] = [made.function for made in cache._watched[learner].known.values()]
    assert function._run.func.__code__.co_nlocals < 512
