"""One table: algorithm x module x execution, in float64 against the slow loops of reference.py.

A new algorithm is one row of ALGORITHMS, and its slow loop in reference.py.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import reference
from family import (
    ALGORITHMS,
    CASES,
    DECAY,
    EXACT,
    EXECUTIONS,
    LR,
    MOMENTUM,
    NESTEROV,
    STEPS,
    answer,
    assert_agrees,
    error,
    rates,
)
from fomaml.engines import curve, meta_gradient
from fomaml.engines.factored import linear_weights
from fomaml.engines.factored import problem as factored_problem
from fomaml.engines.plan import choose
from fomaml.errors import InputError
from fomaml.learning.adapt import SGD, Adam
from fomaml.learning.algorithms import (
    ANIL,
    BOIL,
    FOMAML,
    MAML,
    MetaSGD,
    Reptile,
    SignMAML,
)
from fomaml.learning.problem import Problem
from fomaml.models import MLP, Conv4
from fomaml.tasks import Examples, one
from zoo import MODULES, draw, example


@pytest.mark.parametrize(("algorithm", "module", "execution"), CASES)
def test_agrees_with_the_reference(algorithm, module, execution):
    row, options = ALGORITHMS[algorithm], EXECUTIONS[execution]
    model, tasks, criterion = example(module)
    learner = row.learner(model, criterion)
    refusal = row.factored or (linear_weights(learner) == [] and "no adapted nn.Linear weight")
    if module == "autoencoder" and not refusal and "encode.weight" in linear_weights(learner):
        refusal = "'encode.weight' is used outside of a linear layer"
    if options["engine"] == "factored" and refusal:
        with pytest.raises(InputError, match=refusal):
            meta_gradient(learner, tasks, **options)
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = meta_gradient(learner, tasks, **options)
    assert_agrees(result, answer(algorithm, module), 1e-12 if (algorithm, module) in EXACT else 1e-10)
    assert result.engine == options["engine"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("algorithm", "module"), dict.fromkeys(case[:2] for case in CASES))
def test_backward_of_the_learner_gives_the_same(algorithm, module):
    model, tasks, criterion = example(module)
    learner = ALGORITHMS[algorithm].learner(model, criterion)
    learner(tasks).backward()
    own = learner.meta_parameters()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in own.items()}
    assert error(found, answer(algorithm, module).gradients) <= 1e-10


def test_apply_to_sets_the_gradients_of_the_model():
    model, tasks, criterion = example("user")
    learner = FOMAML(model, LR, STEPS, criterion)
    result = meta_gradient(learner, tasks)
    result.apply_to(learner)
    expected = answer("fomaml", "user").gradients
    for name, parameter in model.named_parameters():
        if name == "frozen":
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("shots", [1, 2, 9])  # support rows × 2 layers' width below and above width²
@pytest.mark.parametrize("module", ["mlp", "twice", "attention", "deep"])
def test_factored_turns_changes_dense_where_they_are_large(module, shots, steps, monkeypatch):
    monkeypatch.setitem(MODULES, "deep", (partial(MLP, 16, 12, 12, 12, 4), (16,), F.cross_entropy))
    model, tasks, criterion = example(module, shots=shots)
    learner = FOMAML(model, LR, steps, criterion)
    expected = reference.over_tasks(
        lambda m, t: reference.fomaml(m, t, criterion, rates(reference.learned(m)), steps),
        model,
        tasks,
    )
    assert_agrees(meta_gradient(learner, tasks, engine="factored"), expected, 1e-12)


def test_the_change_of_a_layer_is_kept_as_factors_and_then_dense():
    """The case above does reach both: factors for few rows, dense when they would cost more."""
    torch.manual_seed(1)
    model = MLP(16, 12, 12, 4).double()
    kinds = {}
    for shots in (1, 9):
        tasks = draw((16,), F.cross_entropy, shots=shots)
        problem = factored_problem(FOMAML(model, LR, STEPS), tasks)
        path = problem.path()
        kinds[shots] = [len(next(path)[0].changes["3.weight"]) for _ in range(STEPS)]
    assert kinds == {1: [2, 1, 1], 9: [1, 1, 1]}


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "shape", "shots", "expected", "compiled"),
    [
        (partial(Conv4, 4), (1, 28, 28), 1, "loop", "loop"),
        (partial(Conv4, 4, channels=8, image=(1, 16, 16)), (1, 16, 16), 1, "batched", "batched"),
        (partial(MLP, 784, 256, 4), (784,), 1, "factored", "factored"),
        (partial(MLP, 784, 256, 4), (784,), 100, "loop", "batched"),
        (partial(MLP, 1, 40, 40, 4), (1,), 20, "batched", "batched"),
        (
            partial(nn.TransformerEncoderLayer, 32, 2, 64, 0.0, batch_first=True),
            (40, 32),
            1,
            "batched",
            "batched",
        ),
        (partial(nn.LSTMCell, 6, 4), (6,), 1, "loop", "loop"),
        (partial(nn.Embedding, 6, 4, sparse=True), (), 1, "loop", "loop"),
    ],
)
def test_choose_names_the_engine_and_the_reason(build, shape, shots, expected, compiled):
    def criterion(outputs, targets):
        return (outputs[0] if isinstance(outputs, tuple) else outputs).square().mean()

    learner = FOMAML(build().double(), LR, STEPS, criterion)
    tasks = draw(shape, F.cross_entropy, shots=shots)
    if isinstance(learner.model, nn.Embedding):
        tasks = tasks._replace(
            **{part: Examples(e.targets, e.targets) for part, e in tasks._asdict().items()}
        )
    assert choose(learner, tasks, compile=True)[0] == compiled
    name, reason = choose(learner, tasks)
    assert name == expected
    assert reason and "\n" not in reason


def test_auto_is_the_engine_of_choose():
    model, tasks, criterion = example("conv4")
    result = meta_gradient(FOMAML(model, LR, STEPS, criterion), tasks)
    assert result.engine == choose(FOMAML(model, LR, STEPS, criterion), tasks)[0] == "batched"
    assert_agrees(result, answer("fomaml", "conv4"), 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, "unknown engine 'fast'; there are: auto, loop, batched, factored"),
        ({"tasks_at_once": 0}, "tasks_at_once must be a whole number of 1 or more, got 0"),
    ],
)
def test_errors_of_meta_gradient_and_curve(options, message):
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, LR, STEPS, criterion)
    for call in (meta_gradient, partial(curve, at_steps=[1])):
        with pytest.raises(InputError) as raised:
            call(learner, tasks, **options)
        assert str(raised.value) == message


def test_outputs_narrower_than_the_classes_are_an_input_error():
    _, tasks, _ = example("mlp")
    with pytest.raises(InputError, match="3"):
        meta_gradient(FOMAML(MLP(36, 12, 3).double(), LR, STEPS), tasks)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("engine", ["auto", "batched"])
@pytest.mark.parametrize("shape", [(36,), (1, 6, 6)], ids=["dense", "convolutions"])
def test_too_few_outputs_are_told_in_words(shape, engine, compile, recwarn):
    """Also where what a task costs is counted before it is computed."""
    convolutions = [nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 3, 1), nn.Flatten()] if len(shape) > 1 else []
    model = nn.Sequential(nn.Flatten(), *convolutions, nn.Linear(108 if convolutions else 36, 3)).double()
    with pytest.raises(InputError, match="too narrow for 4 ways"):
        meta_gradient(
            FOMAML(model, LR, 1), draw(shape, F.cross_entropy, tasks=9), engine=engine, compile=compile
        )


def test_factored_refuses_a_model_without_adapted_linear_weights():
    model, tasks, criterion = example("conv4")
    with pytest.raises(InputError, match=r"no adapted nn\.Linear weight"):
        meta_gradient(FOMAML(model, LR, 1, criterion, adapted="body.*"), tasks, engine="factored")


# --- the curve ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
@pytest.mark.parametrize("module", MODULES)
def test_curve_equals_manual_adaptation(module, engine):
    model, tasks, criterion = example(module)
    if (module, engine) == ("autoencoder", "factored"):
        engine = "auto"  # which falls back
    learner = FOMAML(model, LR, 1, criterion)
    found = curve(learner, tasks, [0, 1, 3], engine=engine)
    for steps, (losses, outputs) in zip([0, 1, 3], found):
        assert not losses.requires_grad and not outputs.requires_grad
        for i in range(3):
            task = one(tasks, i)
            names = rates(reference.learned(model))
            adapted, _ = reference.adapt(model, task.support, criterion, names, steps)
            with torch.no_grad():
                expected = adapted(task.query.inputs)
                loss = criterion(expected, task.query.targets)
            torch.testing.assert_close(outputs[i], expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(losses[i], loss, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
def test_inductive_curve_gives_each_query_example_the_output_it_has_alone(engine):
    model, tasks, criterion = example("conv4")
    learner = FOMAML(model, LR, 1, criterion)
    alone = tasks._replace(query=Examples(*(t[:, 4:5] for t in tasks.query)))
    options = {"at_steps": [0, 2], "engine": engine}
    for steps in (0, 1):
        [all_of_them, one_of_them] = (
            curve(learner, t, statistics="support", **options)[steps][1] for t in (tasks, alone)
        )
        torch.testing.assert_close(all_of_them[:, 4:5], one_of_them, rtol=1e-10, atol=1e-10)
        transductive = curve(learner, tasks, **options)[steps][1]
        assert (transductive[:, 4:5] - one_of_them).abs().max() > 1e-3


@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
@pytest.mark.parametrize("module", ["conv4", "batch-norm"])
def test_curve_with_the_query_example_in_the_statistics(module, engine):
    model, tasks, criterion = example(module)
    learner = FOMAML(model, LR, 1, criterion)
    [_, (_, found)] = curve(learner, tasks, [0, 2], statistics="with-query", engine=engine)
    for i in range(len(found)):
        task = one(tasks, i)
        adapted, _ = reference.adapt(model, task.support, criterion, rates(reference.learned(model)), 2)
        with torch.no_grad():
            expected = [adapted(torch.cat([task.support.inputs, own[None]]))[-1] for own in task.query.inputs]
        torch.testing.assert_close(found[i], torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_unknown_statistics_are_refused():
    model, tasks, criterion = example("conv4")
    with pytest.raises(InputError, match=r"unknown statistics 'alone'; there are: own, support, with-query"):
        curve(FOMAML(model, LR, 1, criterion), tasks, [1], statistics="alone")


class Recurrent(nn.Module):
    """What vmap does not take."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.RNN(3, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, inputs):
        return self.head(self.cell(inputs.unflatten(-1, (2, 3)))[0][:, -1])


@pytest.mark.parametrize("statistics", ["own", "support"])
def test_curve_of_a_recurrent_model_takes_the_loop(statistics):
    torch.manual_seed(1)
    learner = FOMAML(Recurrent().double(), LR, 1)
    tasks = draw((6,), F.cross_entropy)
    [(_, expected)] = curve(learner, tasks, [1], engine="loop")
    [(_, found)] = curve(learner, tasks, [1], statistics=statistics)  # no BatchNorm: the same
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class Particular(nn.Module):
    """Raises what is no RuntimeError, under vmap only."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, inputs):
        if torch._C._functorch.is_batchedtensor(inputs):
            raise ValueError("not these")
        return self.head(inputs)


@pytest.mark.parametrize("engine", ["batched", "factored"])
@pytest.mark.parametrize(
    ("build", "reason"), [(Recurrent, "Batching rule not implemented"), (Particular, "not these")]
)
def test_an_engine_that_does_not_take_the_module_says_which_one_does(build, reason, engine):
    learner, tasks = FOMAML(build().double(), LR, 1), draw((6,), F.cross_entropy)
    message = rf"engine='{engine}' does not take this module, 'loop' does: {reason}"
    with pytest.raises(InputError, match=message) as raised:
        meta_gradient(learner, tasks, engine=engine)
    assert reason in str(raised.value.__cause__)
    with pytest.raises(InputError, match=message):
        curve(learner, tasks, [1], engine=engine)
    assert meta_gradient(learner, tasks).engine == "loop"


def test_an_error_of_the_module_itself_stays_as_it_is():
    class Wrong(Particular):
        def forward(self, inputs):
            raise KeyError("lost")

    for engine in ("loop", "batched", "factored", "auto"):
        with pytest.raises(KeyError, match="lost"):
            meta_gradient(FOMAML(Wrong().double(), LR, 1), draw((6,), F.cross_entropy), engine=engine)


def test_inductive_curve_refuses_a_native_batch_norm_that_would_see_the_query_set():
    model, tasks, criterion = example("batch-norm")
    with pytest.raises(InputError, match=r"'1'.*convert_batch_norm"):
        curve(FOMAML(model, LR, 1, criterion), tasks, [1], statistics="support")


# --- exactness against something that is no autograd ------------------------------------------------


@pytest.mark.parametrize("execution", ["loop", "batched", "batched-2"])
@pytest.mark.parametrize("inner", [{}, MOMENTUM, NESTEROV, DECAY], ids=str)
def test_second_order_equals_central_differences(inner, execution):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softplus()).double()
    tasks = draw((3,), F.cross_entropy, tasks=3, ways=3)
    learner = MAML(model, 0.3, 3, optimizer=SGD(**inner))
    result = meta_gradient(learner, tasks, **EXECUTIONS[execution])
    names = rates(reference.learned(model), 0.3)
    optimizer = partial(torch.optim.SGD, **inner)

    def meta_loss():
        total = 0.0
        for i in range(3):
            task = one(tasks, i)
            adapted, _ = reference.adapt(model, task.support, F.cross_entropy, names, 3, optimizer=optimizer)
            total += F.cross_entropy(adapted(task.query.inputs), task.query.targets).item()
        return total / 3

    width = 1e-5
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        for i in range(0, len(flat), 3):
            centre = flat[i].item()
            sides = []
            for value in (centre + width, centre - width):
                flat[i] = value
                sides.append(meta_loss())
            flat[i] = centre
            difference = (sides[0] - sides[1]) / (2 * width)
            found = result.gradients[name].view(-1)[i].item()
            assert found == pytest.approx(difference, rel=1e-7, abs=1e-9), (name, i)


@pytest.mark.parametrize("execution", ["loop", "batched"])
@pytest.mark.parametrize("elementwise", [True, False])
def test_learned_rates_equal_central_differences(elementwise, execution):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    tasks = draw((3,), F.cross_entropy, ways=3)
    kind = "elementwise" if elementwise else "per-step"
    learner = MAML(model, 0.3, 2, learn_rates=kind)
    result = meta_gradient(learner, tasks, **EXECUTIONS[execution])
    width = 1e-5
    for name, rate in learner.inner_lr.learned().items():
        flat = rate.detach().view(-1)
        for i in range(len(flat)):
            sides = []
            for shift in (width, -2 * width):
                flat[i] += shift
                sides.append(
                    meta_gradient(learner, tasks, **EXECUTIONS[execution]).query_losses.mean().item()
                )
            flat[i] += width
            found = result.gradients[f"inner_lr.{name}"].view(-1)[i].item()
            assert found == pytest.approx((sides[0] - sides[1]) / (2 * width), rel=1e-7, abs=1e-9), (name, i)


@pytest.mark.parametrize("preset", [FOMAML, MAML, ANIL, BOIL, MetaSGD, SignMAML])
def test_without_a_step_the_meta_gradient_is_the_plain_query_gradient(preset):
    model, tasks, criterion = example("conv4-strided")
    learner = preset(model, 0.0, 2, criterion)
    total = (
        sum(criterion(model(one(tasks, i).query.inputs), one(tasks, i).query.targets) for i in range(3)) / 3
    )
    expected = reference.gradients(total, reference.learned(model))
    for engine in ("loop", "batched"):
        found = meta_gradient(learner, tasks, engine=engine).gradients
        assert error({n: found[n] for n in expected}, expected) <= 1e-12


def test_the_meta_gradient_of_reptile_is_the_mean_displacement():
    model, tasks, criterion = example("mlp")
    learner = Reptile(model, LR, STEPS, criterion)
    found = meta_gradient(learner, tasks).gradients
    for name, parameter in model.named_parameters():
        ends = [learner.adapt(one(tasks, i).support).get_parameter(name) for i in range(3)]
        torch.testing.assert_close(found[name], parameter - sum(ends) / 3, rtol=0, atol=1e-14)


def test_first_order_is_not_second_order():
    """What tells the two apart in the table is far above its tolerance."""
    first, second = (answer(name, "mlp").gradients for name in ("fomaml", "maml"))
    assert error(first, second) > 1e-2


# --- memory ---------------------------------------------------------------------------------------


def live_bytes(compute) -> int:
    """How many bytes the graph of the result of `compute` keeps for its backward pass."""
    live = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal live
            self.tensor = tensor
            live += tensor.nbytes

        def __del__(self):
            nonlocal live
            live -= self.tensor.nbytes

    with saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        result = compute()
    assert result.requires_grad  # and with it its graph, until here
    return live


def saved(preset, engine, steps, module="mlp", **choices):
    model, tasks, criterion = example(module)
    learner = preset(model, 0.01, steps, criterion, **choices)
    stacked = engine == "batched"
    return live_bytes(
        lambda: (
            learner.objective(Problem(learner, tasks if stacked else one(tasks, 0), stacked=stacked)).scalar
        )
    )


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("preset", [FOMAML, Reptile])
@pytest.mark.parametrize("module", ["mlp", "conv4", "user"])
@pytest.mark.parametrize("inner", [SGD(), SGD(momentum=0.9), Adam()], ids=["sgd", "momentum", "adam"])
def test_first_order_keeps_no_inner_graph(engine, preset, module, inner):
    sizes = {s: saved(preset, engine, s, module, optimizer=inner) for s in (1, 10)}
    assert 0 < sizes[10] <= 1.05 * sizes[1]


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_second_order_does_and_the_measure_sees_it(engine):
    assert saved(MAML, engine, 10) > 5 * saved(MAML, engine, 1)
    assert saved(MAML, engine, 1) > 1.5 * saved(FOMAML, engine, 1)


def test_factored_keeps_one_forward_pass_and_the_factors():
    """The saved bytes grow by less than the query's own part: the factors, never whole weights."""
    torch.manual_seed(1)
    model = MLP(256, 256, 4)
    tasks = draw((256,), F.cross_entropy, shots=1).to(dtype=torch.float32)

    def kept(steps):
        learner = FOMAML(model, 0.01, steps)
        problem = factored_problem(learner, tasks)
        return live_bytes(lambda: learner.objective(problem).scalar)

    one_weight = 256 * 256 * 4
    assert kept(5) - kept(1) < 3 * one_weight  # below one built weight per task
