"""compile="auto": the rule, and what becomes of a plan for which it has decided."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fomaml
from clusters import episodes
from compiling import inductor, untouched
from fomaml.engines import meta_gradient, pays, plan
from fomaml.engines.compiled import cache
from fomaml.engines.cpu import build
from fomaml.errors import InputError
from fomaml.learning.algorithms import FOMAML, MAML, MAMLPlusPlus
from fomaml.models import MLP, Conv4Strided, ConvNet1d
from fomaml.tasks import Examples, Task
from fomaml.train import train
from zoo import draw

pytestmark = pytest.mark.skipif(bool(cache.too_old()), reason=cache.too_old())

LONG = 1_000_000


def dense(make=FOMAML, dtype=torch.float64, **choices):
    torch.manual_seed(0)
    return make(MLP(6, 8, 4).to(dtype), 0.1, 2, **choices)


def drawn(*shape, dtype=torch.float64, **sizes):
    return draw(shape or (6,), F.cross_entropy, **sizes).to(dtype=dtype)


def strided():
    return FOMAML(Conv4Strided(5), 0.4, 1), drawn(1, 28, 28, dtype=torch.float32, tasks=32, ways=5)


def uneven(learner, tasks):
    query = Examples(tasks.query.inputs[:, :5], tasks.query.targets[:, :5])
    return [
        Task(*(Examples(*(t[0] for t in e)) for e in each)) for each in (tasks, tasks._replace(query=query))
    ]


def as_list(tasks):
    return [Task(*(Examples(*(t[i] for t in e)) for e in tasks)) for i in range(3)]


# --- the rule ---------------------------------------------------------------------------------------


def test_convolutions_pay_at_once_and_dense_layers_in_long_runs():
    learner, tasks = strided()
    assert pays.cost(learner, tasks, "batched").least < 500
    wide = (
        FOMAML(MLP(784, 256, 10), 0.05, 5),
        drawn(784, dtype=torch.float32, tasks=16, ways=5, query_shots=10),
    )
    loops = pays.cost(*wide, "factored")
    assert 200 < loops.least < 2_000
    smooth = FOMAML(nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10)), 0.05, 5)
    judged = FOMAML(wide[0].model, 0.05, 5, lambda outputs, targets: F.cross_entropy(outputs, targets))
    for learner in (smooth, judged):  # what loops may not be written of goes through torch's compiler
        by_inductor = pays.cost(learner, wide[1], "factored")
        assert by_inductor.saved == loops.saved and by_inductor.compiling > 2 * loops.compiling
    series = FOMAML(ConvNet1d(2, 3), 0.05, 5), drawn(2, 40, dtype=torch.float32)
    assert pays.cost(*series, "batched").compiling > 15
    first, second = (pays.cost(make(MLP(6, 8, 4), 0.1, 5), drawn(), "batched") for make in (FOMAML, MAML))
    assert second.compiling > first.compiling


def test_the_rule_goes_by_threads_and_tasks_and_not_by_a_clock(two_threads, monkeypatch):
    learner, tasks = strided()
    two = pays.cost(learner, tasks, "batched")
    torch.set_num_threads(1)
    one = pays.cost(learner, tasks, "batched")
    assert one.least < two.least  # what a call takes is more, what compiling takes the same
    few = pays.cost(learner, tasks.map(lambda tensor: tensor[:4]), "batched")
    assert few.least > one.least
    with monkeypatch.context() as patch:  # no longer: what runs the tests asks clocks too
        for name in ("time", "perf_counter", "monotonic", "process_time"):
            patch.setattr(f"time.{name}", lambda: pytest.fail("asked a clock"))
        again, calls = pays.cost(learner, tasks, "batched"), pays.calls_within(100, learner, tasks)
    assert again == one and calls == pytest.approx(100 / one.call, abs=1)


@pytest.mark.parametrize(
    ("learner", "options", "why"),
    [
        (partial(dense, MAMLPlusPlus, multi_step_iterations=5), {}, "the multi-step loss has other weights"),
        (partial(dense, first_order=lambda i: i < 5), {}, "the order changes while it trains"),
        (partial(dense, dtype=torch.bfloat16), {}, "it gains nothing in torch.bfloat16"),
        (dense, {"autocast": torch.bfloat16}, "it gains nothing in torch.bfloat16"),
        (dense, {"tasks": uneven}, "the tasks have several shapes"),
        (dense, {"compiler": []}, "there is no C++ compiler on this machine"),
        (dense, {"torch": "2.5.0"}, "torch 2.5.0 is too old"),
        (dense, {"iterations": 3}, "iterations on, of 3"),
        (dense, {"iterations": None}, "iterations on, and how many there are is not known"),
    ],
)
def test_what_runs_uncompiled_says_why_and_warns_of_nothing(learner, options, why, monkeypatch):
    monkeypatch.setattr(build, "compiler", lambda: options.get("compiler", ["c++"]))
    monkeypatch.setattr(torch, "__version__", options.get("torch", torch.__version__))
    learner = learner()
    tasks = drawn(dtype=next(learner.parameters()).dtype)
    tasks = options["tasks"](learner, tasks) if "tasks" in options else tasks
    asked = {"autocast": options.get("autocast"), "iterations": options.get("iterations", LONG)}
    own = plan(learner, tasks, compile="auto", **asked)
    assert not own.compile
    assert own.engine == plan(learner, tasks).engine  # as where nobody speaks of compiling
    assert re.search(f"not compiled: .*{re.escape(why)}", own.why), own.why
    own(tasks)


def test_another_device_is_not_compiled_for_by_itself():
    learner = dense()
    tasks = drawn().map(lambda tensor: tensor.to("meta"))
    assert pays.refusal(learner, tasks) == "on meta only where compile=True asks for it"


# --- what it decides --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["yes", 1, None])
def test_compile_is_a_truth_value_or_auto(given):
    for call in (plan, meta_gradient):
        with pytest.raises(InputError, match=f'compile is True, False or "auto", got {given!r}'):
            call(dense(), drawn(), compile=given)


def test_a_long_run_is_compiled_and_a_short_one_is_not(monkeypatch):
    untouched(monkeypatch)
    learner, tasks = dense(), drawn()
    own = plan(learner, tasks, compile="auto", iterations=LONG)
    assert own.compile and own.why.endswith(f"iterations on, of {LONG}")
    found = own(tasks)
    assert own.compiling.unchecked == "" and len(cache._watched[learner].known) == 1
    expected = plan(learner, tasks)(tasks)
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient, expected.gradients[name])
    short = plan(learner, tasks, compile="auto", iterations=10)
    short(tasks)
    assert not short.compile and len(cache._watched[learner].known) == 1


def test_train_decides_by_all_its_iterations(monkeypatch):
    """So that a training that goes on decides as the one from the beginning had."""
    untouched(monkeypatch)
    monkeypatch.setattr(pays, "cost", lambda *_: pays.Cost(1.0, 1.0, 2.0))  # pays from 4 on

    def state(parts, iterations, **options):
        torch.manual_seed(0)
        learner = FOMAML(MLP(6, 8, 3), 0.1, 2)
        optimizer = torch.optim.SGD(learner.parameters(), 0.1)
        for start in parts:
            records = train(
                learner,
                episodes(),
                optimizer,
                iterations=iterations,
                meta_batch_size=4,
                start=start,
                **options,
            )
            for record in records:
                if record.iteration in parts:
                    break
        made = cache._watched.get(learner)
        return learner.state_dict(), made is not None and len(made.known) > 0

    whole, compiled = state([0], 5)
    again, compiled_again = state([0, 3], 5)
    assert compiled and compiled_again
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not state([0], 3)[1]
    assert not state([0], 5, compile=False)[1]
    assert state([0], 3, compile=True)[1]


@pytest.mark.parametrize("spoiled", ["wrong", "broken", "unchecked"])
def test_where_compiling_fails_the_uncompiled_plan_takes_over(spoiled, monkeypatch):
    """Silently, and in all that follows as if it had been asked for."""

    def compile(graph, *arguments):
        if spoiled == "broken":
            raise RuntimeError("no such thing")
        return lambda *inputs: [2 * tensor if spoiled == "wrong" else tensor for tensor in graph(*inputs)]

    inductor(monkeypatch, compile)
    if spoiled == "unchecked":
        monkeypatch.setattr("fomaml.engines.compiled.trust.compare", lambda *_: "it is a secret")
    reason = {"wrong": "what was compiled is off", "broken": "no such thing", "unchecked": "it is a secret"}
    learner = FOMAML(MLP(400, 300, 4).double(), 0.1, 2)
    tasks = drawn(400, tasks=4, query_shots=400)
    eager = plan(learner, tasks)
    own = plan(learner, tasks, compile="auto", iterations=LONG)
    assert own.compile
    found, expected = own(tasks), eager(tasks)
    assert not own.compile and own.compiling.failure.startswith(reason[spoiled])
    assert (own.engine, own.tasks_at_once) == (eager.engine, eager.tasks_at_once)
    assert f"not compiled: {reason[spoiled]}" in own.why
    assert all(torch.equal(found.gradients[n], expected.gradients[n]) for n in found.gradients)
    again = plan(learner, tasks, compile="auto", iterations=LONG, decided=True)
    with pytest.raises(InputError, match="this run was compiled, and cannot be here: " + reason[spoiled]):
        again(tasks)
    with pytest.warns(RuntimeWarning, match=reason[spoiled]):  # who asks for it is told, once
        meta_gradient(learner, tasks, compile=True)
    meta_gradient(learner, tasks, compile=True)


def test_shapes_that_do_not_come_back_run_uncompiled(monkeypatch):
    untouched(monkeypatch)
    learner = dense()
    own = plan(learner, drawn(), compile="auto", iterations=LONG)
    for query_shots in range(3, 8):
        own(drawn(query_shots=query_shots))
    assert len(cache._watched[learner].known) == 1  # the one that was decided for
    as_a_list = as_list(drawn())
    learner = dense()
    own = plan(learner, as_a_list, compile="auto", iterations=LONG)
    assert own.compile
    own(as_a_list)
    assert learner not in cache._watched
    own(as_a_list)  # came back
    assert len(cache._watched[learner].known) == 1


def test_a_changed_attribute_is_not_compiled_anew(monkeypatch):
    untouched(monkeypatch)
    torch.manual_seed(0)
    learner, tasks = (
        FOMAML(nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.1), nn.Linear(8, 4)).double(), 0.1, 1),
        drawn(),
    )
    own = plan(learner, tasks, compile="auto", iterations=LONG)
    own(tasks)
    learner.model[1].negative_slope = 0.5
    found, expected = own(tasks), plan(learner, tasks)(tasks)
    assert own.compiling.failure == "1.negative_slope has changed since it was compiled"
    assert all(torch.equal(found.gradients[n], expected.gradients[n]) for n in found.gradients)


def test_the_short_form_compiles_when_it_would_have_paid(monkeypatch):
    untouched(monkeypatch)
    monkeypatch.setattr("fomaml.engines.short.least", lambda *_: 2)
    learner, tasks = dense(), drawn()
    for calls in range(1, 6):
        meta_gradient(learner, tasks, compile="auto")
        meta_gradient(
            learner, drawn(query_shots=4 + calls), compile="auto"
        )  # other shapes count for themselves
        made = cache._watched.get(learner)
        assert (made is not None and len(made.known) == 1) == (calls > 2)
    assert fomaml.meta_gradient(learner, tasks).engine == "batched"
