"""What was compiled is compared with the eager engine before it is trusted: a planted wrong kernel is not."""

import warnings
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.workloads import WORKLOADS, build
from compiling import assert_close, graph, inductor, made, unchanged, untouched
from convolutions import convolutional
from family import LR, assert_agrees
from fomaml.engines import ENGINES, meta_gradient
from fomaml.engines.common import differentiate
from fomaml.engines.compiled import cache, trace, trust
from fomaml.engines.compiled.cache import too_old
from fomaml.engines.cpu import fusion, kernels
from fomaml.learning.algorithms import FOMAML
from fomaml.tasks import Examples, Task
from zoo import draw, example

pytestmark = pytest.mark.skipif(bool(too_old()), reason=too_old())
OFF = "compile=True runs uncompiled: what was compiled is off the eager engine by "


def scaled(function, number, by=1.01):
    """The function with one of its results wrong by a per cent."""

    def wrong(*arguments, **options):
        found = list(function(*arguments, **options))
        found[number] = None if found[number] is None else found[number] * by
        return found

    return wrong


def plant(where, monkeypatch):
    """A wrong kernel, and a learner that takes it, its tasks and its engine."""
    if where == "loop":
        wrong = scaled(kernels.norm_relu_pool_backward, 1)  # by γ
        monkeypatch.setattr(fusion, "norm_relu_pool_backward", wrong)
    elif where == "stacked":
        wrong = scaled(kernels.convolution_backward, 1)  # by the weights
        monkeypatch.setattr(kernels, "convolution_backward", wrong)
    elif where == "dropout":  # not fused, and so nothing of ours is in it
        forward = trace._forward
        monkeypatch.setattr(trace, "_forward", lambda graph: scaled(forward(graph), 0))
    else:
        real = torch._inductor.compile
        inductor(monkeypatch, lambda *arguments: scaled(real(*arguments), 0))
    if where == "inductor":
        model, tasks, criterion = example("regression")
        return FOMAML(model, LR, 1, criterion), tasks, "batched"
    model, tasks, _ = convolutional("wide")
    if where == "dropout":
        model.insert(3, nn.Dropout())
    return FOMAML(model, LR, 1), tasks, "batched" if where == "stacked" else "loop"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("where", ["loop", "stacked", "dropout", "inductor"])
def test_a_planted_wrong_kernel_is_rejected(where, dtype, monkeypatch):
    learner, tasks, engine = plant(where, monkeypatch)
    learner.to(dtype)
    tasks = tasks.to(dtype=dtype)
    torch.manual_seed(3)
    with pytest.warns(RuntimeWarning) as told:
        found = meta_gradient(learner, tasks, engine=engine, compile=True)
    assert len(told) == 1 and str(told[0].message).startswith(OFF) and told[0].filename == __file__
    for _ in range(2):
        torch.manual_seed(3)
        assert_agrees(found, meta_gradient(learner, tasks, engine=engine), 1e-10)
        torch.manual_seed(3)
        found = meta_gradient(learner, tasks, engine=engine, compile=True)  # no warning: it is eager for good
    assert made(learner) == 1


@pytest.mark.parametrize("where", ["loop", "stacked", "dropout", "inductor"])
def test_what_is_planted_is_all_that_is_wrong(where, monkeypatch):
    """The same learners, the wrong kernels too, where nothing is wrong with them."""
    monkeypatch.setattr(f"{__name__}.scaled", lambda function, number: function)
    learner, tasks, engine = plant(where, monkeypatch)
    torch.manual_seed(3)
    found = meta_gradient(learner, tasks, engine=engine, compile=True)
    torch.manual_seed(3)
    assert_agrees(found, meta_gradient(learner, tasks, engine=engine), 1e-10)


def compiled_wrongly(monkeypatch, times):
    """`torch.compile`'s backend makes what is wrong at the first calls; their number so far is the result."""
    calls = []

    def compile(graph, *arguments):
        def run(*inputs):
            calls.append([each.clone() for each in inputs])
            found = graph(*inputs)
            return [1.1 * found[0], *found[1:]] if len(calls) <= times else found

        return run

    inductor(monkeypatch, compile)
    return calls


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_a_miss_is_repeated_on_two_other_chunks(times, size, monkeypatch):
    calls = compiled_wrongly(monkeypatch, times)
    model, _, criterion = example("mlp")
    tasks = draw((1, 6, 6), criterion, tasks=5)
    learner = FOMAML(model, LR, 1)
    seen = []
    compare = trust.compare
    monkeypatch.setattr(trust, "compare", lambda *given: (compare(*given), seen.append(len(calls)))[0])
    options = {"engine": "batched", "tasks_at_once": size}
    if times == 3:
        with pytest.warns(RuntimeWarning, match=OFF):
            found = meta_gradient(learner, tasks, compile=True, **options)
        assert len(calls) == 3
    else:
        found = meta_gradient(learner, tasks, compile=True, **options)
        assert seen == [times + 1]
    assert_agrees(found, meta_gradient(learner, tasks, **options), 1e-10)
    inputs = trust._repeated(tasks).support.inputs
    for number, call in enumerate(calls[: min(times + 1, 3)]):
        [support] = [tensor for tensor in call if tensor.shape[1:] == inputs.shape[1:]]
        if size == 1:  # other tasks of the batch
            assert torch.equal(support, inputs[number : number + 1])
        else:
            assert torch.equal(support, inputs) == (number == 0)
            assert (support - inputs).abs().max() < 0.1


def test_few_examples_stand_for_all():
    few, many = torch.rand(2, 3, 4), torch.rand(2, 17, 4)
    tasks = Task(Examples(few, few), Examples({"a": (many, many + 1)}, many))
    found = trust._repeated(tasks)
    assert torch.equal(found.support.inputs, few) and found.query.targets is many
    for own, whole in zip(found.query.inputs["a"], tasks.query.inputs["a"]):
        assert own.shape == whole.shape and len(own[0].unique(dim=0)) == trust.DISTINCT
        assert all(torch.equal(own[:, place], whole[:, place % 7]) for place in range(17))


def test_examples_that_are_taken_for_each_other_are_seen(monkeypatch):
    """Though few of those that are compared are distinct."""

    def compile(graph, *arguments):
        def run(*inputs):
            return graph(*[each.roll(1, 1) if each.shape[1:] == (12, 6) else each for each in inputs])

        return run

    inductor(monkeypatch, compile)
    torch.manual_seed(0)
    examples = [Examples(torch.randn(3, number, 6), torch.randint(4, (3, number))) for number in (12, 15)]
    learner, tasks = FOMAML(nn.Linear(6, 4), LR, 1), Task(*examples)
    with pytest.warns(RuntimeWarning, match=OFF):
        meta_gradient(learner, tasks, engine="batched", compile=True)


def test_tasks_moved_a_little():
    tasks = draw((6,), F.cross_entropy)
    first, second = islice(trust._moved(tasks), 2)
    again = next(trust._moved(tasks))
    for part in range(2):
        assert torch.equal(first[part].targets, tasks[part].targets)
        assert not torch.equal(first[part].inputs, second[part].inputs)
        assert torch.equal(first[part].inputs, again[part].inputs)  # whatever was drawn before
        assert 0 < (first[part].inputs - tasks[part].inputs).abs().max() < 0.1
    whole = tasks.map(lambda tensor: tensor.long())
    for seed, moved in enumerate(islice(trust._moved(whole), 2), start=1):
        assert torch.equal(moved.support.inputs, whole.support.inputs.roll(seed, 1))
        assert torch.equal(moved.support.targets, whole.support.targets)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_a_comparison_leaves_no_trace(engine, monkeypatch):
    untouched(monkeypatch)
    model, tasks, _ = convolutional("batch-norm")
    model.insert(4, nn.Dropout())
    learner = FOMAML(model.train(), LR, 2)
    for _ in range(2):  # compiled and compared, or neither
        check, before = unchanged(model), torch.get_rng_state()
        found = meta_gradient(learner, tasks, engine=engine, compile=True)
        check()
        after = torch.get_rng_state()
        assert not torch.equal(before, after) and torch.get_num_threads() == 1
        torch.set_rng_state(before)
        assert all(parameter.grad is None for parameter in model.parameters())
    again = meta_gradient(learner, tasks, engine=engine, compile=True)
    assert torch.equal(after, torch.get_rng_state())
    assert all(torch.equal(found.gradients[name], again.gradients[name]) for name in found.gradients)


def test_random_numbers_that_are_others_are_told_once(monkeypatch):
    """As the inductor's may be."""

    def compile(graph, *arguments):
        def run(*inputs):
            torch.rand(3)
            return graph(*inputs)

        return run

    inductor(monkeypatch, compile)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 4)).double()
    learner, tasks = FOMAML(model, LR, 1), draw((6,), F.cross_entropy)
    with pytest.warns(RuntimeWarning) as told:
        meta_gradient(learner, tasks, engine="batched", compile=True)
    assert [str(each.message) for each in told] == [
        "compile=True runs what was not compared with the eager engine: its random numbers are others"
    ]
    assert told[0].filename == __file__
    meta_gradient(learner, tasks, engine="batched", compile=True)
    assert graph_is_compiled(learner)


def graph_is_compiled(learner):
    [made] = cache._watched[learner].known.values()
    return made.function is not None


def test_an_eager_engine_out_of_memory_leaves_it_unchecked(monkeypatch):
    untouched(monkeypatch)

    def run(learner, compiled, find, *given):
        def full(chunk):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        return compare(learner, compiled, full, *given)

    compare = trust.compare
    monkeypatch.setattr(trust, "compare", run)
    model, tasks, _ = example("mlp")
    learner = FOMAML(model, LR, 1)
    with pytest.warns(RuntimeWarning, match="not compared with the eager engine: that takes more memory"):
        found = meta_gradient(learner, tasks, engine="batched", compile=True)
    assert graph(learner)
    assert_agrees(found, meta_gradient(learner, tasks, engine="batched"), 1e-10)


class Kinks(nn.Module):
    """Rounds its inputs, so that float32 is far from float64."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, inputs):
        return self.layer(inputs * 1e5 + 0.1 - inputs * 1e5)


@pytest.mark.parametrize(("by", "taken"), [(1.5, False), (1.01, True)])
def test_as_far_off_as_the_eager_engine_from_float64_is_near(by, taken, monkeypatch):
    """Its own error is some per cents here; where nothing says so a per cent is too much."""
    inductor(monkeypatch, lambda graph, *arguments: scaled(graph, 0, by))
    learner, tasks = FOMAML(Kinks(), LR, 1), draw((6,), F.cross_entropy).to(dtype=torch.float32)

    def run(learner):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            meta_gradient(learner, tasks, engine="batched", compile=True)
        return [str(each.message)[: len(OFF)] for each in told]

    assert run(learner) == ([] if taken else [OFF])
    monkeypatch.setattr(trust, "_moved", lambda chunk, by=0: iter([chunk] * 3))  # no other bits
    assert run(FOMAML(Kinks(), LR, 1)) == ([] if taken else [OFF])
    monkeypatch.setattr(trust, "_exactly_found", lambda *given: 1 / 0)  # does not run in float64
    assert run(FOMAML(Kinks(), LR, 1)) == [OFF]


def test_float64_that_draws_other_numbers_says_nothing_of_rounding(monkeypatch):
    untouched(monkeypatch)

    class Noisy(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs + torch.randn(inputs.shape, dtype=self.weight.dtype))

    learner, tasks = FOMAML(Noisy(6, 4), LR, 1), draw((6,), F.cross_entropy).to(dtype=torch.float32)

    def find(chunk):
        return differentiate(learner, ENGINES["batched"](learner, chunk))

    def eagerly():
        return trust._run(lambda: find(tasks))

    def wrong(chunk):
        found = find(chunk)
        return found._replace(gradients=[2 * gradient for gradient in found.gradients])

    assert not trust._rounds_so(learner, find, wrong, (0.0, 2e-3), tasks, *eagerly())
    learner.model = nn.Sequential(nn.Dropout(), nn.Linear(6, 4))
    learner = FOMAML(learner.model, LR, 1)
    assert trust._rounds_so(learner, find, find, (0.0, 0.0), tasks, *eagerly())


@pytest.mark.parametrize(
    ("eager", "factor", "taken"),
    [
        ([1.0, 1.05, 1.0], 1.04, False),  # one unlucky rounding of three excuses nothing
        ([1.0, 1.05, 1.11], 1.04, True),  # each of them moves it by as much
        ([1.0, 1.05, 1.11], 1.4, False),
        ([1.0, 1.05, 1.0], 1.0, True),
    ],
)
def test_the_last_bits_of_inputs_excuse_what_they_always_change(eager, factor, taken, monkeypatch):
    tasks = draw((6,), F.cross_entropy).to(dtype=torch.float32)
    moved = [tasks.map(lambda tensor, by=by: tensor + by) for by in (1, 2)]
    monkeypatch.setattr(trust, "_moved", lambda *_: iter(moved))
    monkeypatch.setattr(trust, "_repeated", lambda chunk: chunk)
    monkeypatch.setattr(trust, "_exactly_found", lambda *_: found_of([eager[0]]))
    chunks = [tasks, *moved]

    def find(chunk):
        return found_of([eager[next(i for i, each in enumerate(chunks) if each is chunk)]])

    def compiled(chunk):
        found = find(chunk)
        off = 1.04 if chunk is tasks and factor == 1.0 else factor
        return found._replace(gradients=[off * gradient for gradient in found.gradients])

    learner = FOMAML(nn.Linear(6, 4), LR, 1)
    apart = trust._apart(learner, compiled(tasks), find(tasks))
    expected = trust._run(lambda: find(tasks))
    assert trust._rounds_so(learner, find, compiled, apart, tasks, *expected) == taken


def found_of(*gradients, losses=(1.0,)):
    losses = torch.tensor(losses)
    return trust.Found([torch.tensor(each) for each in gradients], losses, losses[None], losses[None])


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        (found_of([1.0, 2.0]), found_of([1.0, 2.0]), (0, 0)),
        (found_of([3.0, 4.5]), found_of([3.0, 4.0]), (0, 0.1)),
        (
            found_of([3.0, 4.0], [1e-3]),
            found_of([3.0, 4.0], [0.0]),
            (0, 0.02),
        ),  # by a hundredth of the norm of all
        (found_of([0.0]), found_of([0.0]), (0, 0)),
        (found_of([1.0]), found_of([0.0]), (0, float("inf"))),
        (found_of([3.0, 4.0], losses=[2.0]), found_of([3.0, 4.0], losses=[1.0]), (1, 0)),
        (found_of([float("nan"), 4.0]), found_of([3.0, 4.0]), (0, float("inf"))),
        (found_of([3.0, 4.0]), found_of([float("nan"), 4.0], [1.0, 1.0]), (0, float("inf"))),
        (found_of([1j + 1]), found_of([1 + 0j]), (0, 1)),
    ],
)
def test_how_far_apart(one, other, apart):
    assert trust._apart(None, one, other) == pytest.approx(apart, abs=1e-6)


def test_lower_precision_is_compared_by_its_own_error(monkeypatch):
    untouched(monkeypatch)
    model, tasks, _ = example("mlp")
    learner, tasks = FOMAML(model.float(), LR, 2), tasks.to(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = meta_gradient(learner, tasks, engine="batched", compile=True, autocast=torch.bfloat16)
    assert_close(found, meta_gradient(learner, tasks, engine="batched"), 0.1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("workload", ["C", "E"])
def test_the_workloads_with_convolutions_pass(workload, seed):
    setup = build(WORKLOADS[workload], torch.float32, seed)
    learner = FOMAML(setup.own_model(), setup.workload.inner_lr, setup.workload.steps, setup.criterion)
    few = setup.tasks.map(lambda tensor: tensor[:3])
    assert len(meta_gradient(learner, few, compile=True).query_losses) == 3  # without a warning
    assert graph_is_compiled(learner)
