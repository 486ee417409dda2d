import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import fomaml.outer
from clusters import clusters, episodes, learner
from fomaml.checkpoint import load_state, save_state
from fomaml.data.source import ClassSource
from fomaml.data.synthetic import Sinusoids
from fomaml.engines import ENGINES, meta_gradient, plan
from fomaml.episodes import RegressionEpisodes
from fomaml.errors import InputError
from fomaml.evaluate import evaluate
from fomaml.learning.adapt import SGD
from fomaml.learning.algorithms import FOMAML, MAML, Reptile
from fomaml.models import MLP, BatchNorm
from fomaml.train import cosine, fomaml_train, train


def bits(module):
    return [tensor.clone() for tensor in module.state_dict().values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def run(learner, optimizer, iterations=6, **options):
    options = {"meta_batch_size": 4} | options
    return list(train(learner, episodes(), optimizer, iterations=iterations, **options))


# --- one outer step -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "loop", "batched", "factored"])
def test_an_outer_step_moves_the_parameters_of_the_original_model_and_no_buffer(engine):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    meta = FOMAML(model, 0.1, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradient = meta_gradient(meta, episodes().batch(0, 4), engine=engine).gradients
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    [record] = run(meta, optimizer, iterations=1, engine=engine)
    assert meta.model is model
    assert record.iteration == 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] - 0.5 * gradient[name]), name
        assert parameter.grad is None
    assert max((p - before[n]).abs().max().item() for n, p in model.named_parameters()) > 1e-4
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_records_hold_the_losses_and_the_scores_of_before_and_after():
    meta, tasks = learner(), episodes().batch(0, 4)
    result = meta_gradient(meta, tasks)
    with torch.no_grad():
        outputs = meta.model(tasks.query.inputs.flatten(0, 1))
    expected = (outputs.argmax(-1) == tasks.query.targets.flatten()).double().mean()
    optimizer = torch.optim.SGD(meta.parameters(), lr=0.1)
    records = run(meta, optimizer, iterations=5, measure_every=3)
    assert [r.iteration for r in records] == [1, 2, 3, 4, 5]
    assert [r.before is not None for r in records] == [False, False, True, False, True]
    assert [r.after is not None for r in records] == [False, False, True, False, True]
    assert torch.equal(records[0].meta_loss, result.query_losses.mean())
    other = learner()
    [first] = run(other, torch.optim.SGD(other.parameters(), lr=0.1), iterations=1)
    assert first.before.item() == pytest.approx(expected.item())
    right = result.query_outputs.argmax(-1) == tasks.query.targets
    assert first.after.item() == pytest.approx(right.double().mean().item())


def test_cosine_falls_from_one_to_zero():
    schedule = cosine(10)
    assert schedule(0) == 1
    assert schedule(5) == pytest.approx(0.5)
    assert schedule(10) == pytest.approx(0)
    values = [schedule(i) for i in range(11)]
    assert values == sorted(values, reverse=True)


def test_the_schedule_scales_the_step():
    meta = learner()
    before = bits(meta)
    optimizer = torch.optim.SGD(meta.parameters(), lr=0.1)
    run(meta, optimizer, iterations=1, schedule=lambda iteration: 0.0)
    assert same(bits(meta), before)
    rates = []
    meta = learner()
    optimizer = torch.optim.SGD(meta.parameters(), lr=0.1)
    options = {"iterations": 3, "meta_batch_size": 2, "schedule": lambda i: 1 / (1 + i)}
    for _ in train(meta, episodes(), optimizer, **options):
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.05, 0.1 / 3])


def test_a_scheduler_of_torch_is_not_overruled():
    meta = learner()
    optimizer = torch.optim.SGD(meta.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    used = []
    optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))
    for _ in train(meta, episodes(), optimizer, iterations=3, meta_batch_size=2):
        scheduler.step()
    assert used == pytest.approx([0.1, 0.05, 0.025])


def test_the_outer_iteration_reaches_the_learner():
    """First order at first, second order from iteration 2 on: the bits part there."""
    runs = {}
    for name, first_order in {"never": False, "at first": lambda i: i < 2, "always": True}.items():
        meta, states = learner(first_order=first_order), []
        optimizer = torch.optim.SGD(meta.parameters(), lr=0.1)
        for _ in train(meta, episodes(), optimizer, iterations=3, meta_batch_size=2, engine="loop"):
            states.append(bits(meta))
        runs[name] = states
    assert [same(a, b) for a, b in zip(runs["at first"], runs["always"])] == [True, True, False]
    assert not same(runs["never"][0], runs["always"][0])


def test_running_statistics_move_in_the_outer_loop_only():
    torch.manual_seed(5)
    layer = BatchNorm(16, policy="running")
    model = nn.Sequential(nn.Linear(6, 16), layer, nn.ReLU(), nn.Linear(16, 3))
    meta = FOMAML(model, 0.1, 2)
    meta_gradient(meta, episodes().batch(0, 4))
    assert layer.mean.abs().max() == 0
    run(meta, torch.optim.SGD(model.parameters(), lr=0.1), iterations=60)
    with torch.no_grad():
        inputs = model[0](episodes().batch(1000, 50).query.inputs.flatten(0, 1))
    variance, mean = torch.var_mean(inputs, 0)
    assert (layer.mean[0] - mean).abs().max() < variance.sqrt().max()
    assert layer.mean.abs().max() > 0.1


# --- the plan -------------------------------------------------------------------------------------


class OnlyBatches:
    """Episodes of one's own: `batch` and nothing else."""

    def batch(self, start, tasks):
        return episodes().batch(start, tasks)


def test_own_episodes_may_have_batch_alone():
    found = []
    for tasks in (episodes(), OnlyBatches()):
        meta = learner()
        options = {"iterations": 3, "meta_batch_size": 4}
        list(train(meta, tasks, torch.optim.SGD(meta.parameters(), lr=0.1), **options))
        found.append([*bits(meta), *evaluate(meta, tasks, tasks=5, at_steps=[0, 2]).values()])
    assert same(*found)


def test_a_run_has_one_plan_which_its_first_look_does_not_change(monkeypatch):
    """Before the first meta-gradient it looks at the query sets without gradients."""
    plans = []
    monkeypatch.setattr(fomaml.outer, "make_plan", lambda *a, **o: plans.append(plan(*a, **o)) or plans[-1])
    torch.manual_seed(5)
    meta = FOMAML(MLP(6, 200, 200, 3), 0.1, 2)
    records = run(meta, torch.optim.SGD(meta.parameters(), lr=0.1), iterations=3)
    assert all(record.before is not None for record in records)
    assert [own.engine for own in plans] == ["factored"]


@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
def test_a_run_by_its_callers_plan_is_that_by_the_same_options(engine):
    found = []
    for given in (False, True):
        meta = learner()
        options = {"engine": engine, "tasks_at_once": 2}
        if given:
            options = {"plan": plan(meta, episodes().batch(0, 4), **options)}
        records = run(meta, torch.optim.SGD(meta.parameters(), lr=0.1), **options)
        found.append([*bits(meta), *(tensor for record in records for tensor in record[1:4])])
    assert same(*found)


def test_a_plan_that_was_halved_is_handed_on_to_the_run_that_goes_on(monkeypatch):
    most, problem = 3, ENGINES["batched"]

    def guarded(learner, chunk, **facts):
        if len(chunk.support.targets) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return problem(learner, chunk, **facts)

    monkeypatch.setitem(ENGINES, "batched", guarded)
    whole, parts = learner(), learner()
    own = plan(whole, episodes().batch(0, 4), engine="batched")
    with pytest.warns(RuntimeWarning, match="out of memory: 2 tasks at once from now on"):
        run(whole, torch.optim.SGD(whole.parameters(), lr=0.1), plan=own)
    assert own.tasks_at_once == 2
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.1)
    first = plan(parts, episodes().batch(0, 4), engine="batched")
    with pytest.warns(RuntimeWarning):
        run(parts, optimizer, iterations=3, plan=first)
    most = 4  # as on another machine: the bits stay those of the run that was not interrupted
    run(parts, optimizer, start=3, engine="batched", tasks_at_once=first.tasks_at_once)
    assert same(bits(whole), bits(parts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "loop"}, "engine='loop' goes to engines.plan, not to train beside a plan"),
        ({"tasks_at_once": 0}, "tasks_at_once=0 goes to engines.plan, not to train beside a plan"),
        ({"compile": True}, "compile=True goes to engines.plan, not to train beside a plan"),
        (
            {"autocast": torch.bfloat16},
            "autocast=torch.bfloat16 goes to engines.plan, not to train beside a plan",
        ),
    ],
)
def test_a_plan_has_settled_what_it_was_made_with(options, message):
    meta = learner()
    own = plan(meta, episodes().batch(0, 4))
    with pytest.raises(InputError) as raised:
        run(meta, torch.optim.SGD(meta.parameters(), lr=0.1), plan=own, **options)
    assert str(raised.value) == message


def test_a_plan_is_for_its_own_learner():
    meta = learner()
    own = plan(learner(), episodes().batch(0, 4))
    with pytest.raises(InputError, match=r"^the plan was made for another learner; make one for this one$"):
        run(meta, torch.optim.SGD(meta.parameters(), lr=0.1), plan=own)


# --- the same bits --------------------------------------------------------------------------------


def optimiser(meta, kind):
    if kind == "adam":
        return torch.optim.Adam(meta.parameters(), lr=1e-2)
    return torch.optim.SGD(meta.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
def test_same_seed_same_bits(engine):
    found = []
    for _ in range(2):
        meta = learner()
        run(meta, optimiser(meta, "adam"), engine=engine)
        found.append(bits(meta))
    assert same(*found)
    assert not same(found[0], bits(learner()))


@pytest.mark.parametrize("schedule", [None, cosine(6)], ids=["constant", "cosine"])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("preset", [FOMAML, Reptile])
def test_a_resumed_run_equals_the_uninterrupted_one(preset, kind, schedule, tmp_path):
    whole = learner(preset)
    run(whole, optimiser(whole, kind), schedule=schedule)

    first = learner(preset)
    optimizer = optimiser(first, kind)
    options = {"iterations": 6, "meta_batch_size": 4, "schedule": schedule}
    for record in train(first, episodes(), optimizer, **options):
        if record.iteration == 3:
            save_state(tmp_path / "state.safetensors", first, optimizer, record.iteration)
            break

    torch.manual_seed(99)  # another start: everything must come from the file
    second = preset(MLP(6, 16, 3), 0.1, 2)
    optimizer = optimiser(second, kind)
    start = load_state(tmp_path / "state.safetensors", second, optimizer)
    records = run(second, optimizer, schedule=schedule, start=start)
    assert [r.iteration for r in records] == [4, 5, 6]
    assert same(bits(second), bits(whole))


# --- errors ---------------------------------------------------------------------------------------


def test_a_model_too_narrow_for_the_ways():
    model = MLP(6, 8, 2)
    message = "the model's outputs have shape (12, 2), too narrow for 3 ways: its last layer needs at least 3 outputs"
    meta = FOMAML(model, 0.1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call in (lambda: run(meta, optimizer), lambda: evaluate(meta, episodes(), tasks=2)):
        with pytest.raises(InputError) as raised:
            call()
        assert str(raised.value) == message


@pytest.mark.parametrize("name", ["iterations", "meta_batch_size", "measure_every"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_counts_must_be_positive(name, value):
    meta = learner()
    with pytest.raises(InputError, match=f"{name} must be a whole number of 1 or more, got {value}"):
        run(meta, torch.optim.SGD(meta.parameters(), lr=0.1), **{name: value})


def test_a_meta_loss_that_is_not_finite_stops_the_run():
    meta = FOMAML(learner().model, 1e38, 3)
    with pytest.raises(
        InputError, match=r"is nan at iteration 1, task 0: the inner loop diverges.* try a smaller"
    ):
        run(meta, torch.optim.SGD(meta.parameters(), lr=0.1))


def test_meta_parameters_that_are_not_finite_are_refused_at_the_call():
    meta = learner()
    with torch.no_grad():
        meta.model[1].weight[0] = math.inf
    with pytest.raises(InputError, match=r"meta-parameter 1\.weight is not finite before the first step"):
        train(meta, episodes(), torch.optim.SGD(meta.parameters(), lr=0.1), iterations=1, meta_batch_size=1)


# --- fomaml_train ---------------------------------------------------------------------------------

SIZES = {"ways": 3, "shots": 2, "query_shots": 4, "meta_batch_size": 8}


@pytest.mark.parametrize("kind", ["dataset", "source"])
def test_fomaml_train_moves_the_model_and_lowers_the_meta_loss(kind):
    inputs, labels = clusters()
    dataset = TensorDataset(inputs, labels) if kind == "dataset" else ClassSource(inputs, labels)
    torch.manual_seed(5)
    model, lines = MLP(6, 16, 3), []
    before = bits(model)
    losses = fomaml_train(model, dataset, 35, 2, 0.2, 0.3, **SIZES, report=lines.append)
    assert len(losses) == 35 and all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert not any(torch.equal(a, b) for a, b in zip(bits(model), before))
    assert lines == [f"iteration {i}: meta-loss {losses[i - 1]:.4f}" for i in (10, 20, 30)]


def test_fomaml_train_prints_by_default_and_repeats_itself(capsys):
    dataset, found = TensorDataset(*clusters()), []
    for seed in (1, 1, 2):
        torch.manual_seed(5)
        found.append(fomaml_train(MLP(6, 8, 3), dataset, 10, 1, 0.1, 0.1, **SIZES, seed=seed))
    assert found[0] == found[1] != found[2]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"iteration 10: meta-loss {losses[-1]:.4f}" for losses in found]


@pytest.mark.parametrize(
    ("arguments", "sizes", "message"),
    [
        ((0, 1, 0.1, 0.1), {}, "num_iterations must be a whole number of 1 or more, got 0"),
        ((5, 0, 0.1, 0.1), {}, "num_inner_updates must be a whole number of 1 or more, got 0"),
        ((5, 1, -0.1, 0.1), {}, "inner_lr must be a positive finite number, got -0.1"),
        ((5, 1, 0.1, 0.0), {}, "meta_lr must be a positive finite number, got 0.0"),
        ((5, 1, 0.1, 0.1), {"ways": 0}, "ways must be a whole number of 1 or more, got 0"),
        ((5, 1, 0.1, 0.1), {"shots": 0}, "shots must be a whole number of 1 or more, got 0"),
        ((5, 1, 0.1, 0.1), {"query_shots": 0}, "query_shots must be a whole number of 1 or more, got 0"),
        ((5, 1, 0.1, 0.1), {"meta_batch_size": 0}, "meta_batch_size must be a whole number of 1 or more, got 0"),
        ((5, 1, 0.1, 0.1), {"ways": 9}, "9 ways need 9 classes, but there are 8"),
        ((5, 1, 0.1, 0.1), {"query_shots": 11},
         "class '0' has 12 examples, but 2 shots + 11 query examples per class need 13"),
        ((5, 1, 0.1, 0.1), {"ways": 4}, "the model's outputs have shape (16, 3), too narrow for 4 ways: "
         "its last layer needs at least 4 outputs"),
    ],
)  # fmt: skip
def test_errors_of_fomaml_train(arguments, sizes, message, capsys):
    model = MLP(6, 8, 3)
    before = bits(model)
    with pytest.raises(InputError) as raised:
        fomaml_train(model, TensorDataset(*clusters()), *arguments, **(SIZES | sizes))
    assert str(raised.value) == message
    assert same(bits(model), before)
    assert capsys.readouterr().out == ""


# --- regression -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "optimizer"), [(FOMAML, SGD()), (MAML, SGD()), (FOMAML, SGD(momentum=0.5))],
    ids=["fomaml", "maml", "fomaml-momentum"],
)  # fmt: skip
def test_sinusoids_are_learned_to_be_learned(preset, optimizer):
    torch.manual_seed(0)
    model = MLP(1, 40, 40, 1)
    meta = preset(model, 0.02, 2, F.mse_loss, optimizer=optimizer)
    tasks = RegressionEpisodes(Sinusoids(), shots=10, query_shots=10)
    outer = torch.optim.Adam(model.parameters(), lr=3e-3)
    options = {"iterations": 300, "meta_batch_size": 16, "measure_every": 300}
    *_, last = train(meta, tasks, outer, **options)
    assert last.after.item() == pytest.approx(last.meta_loss.item())
    unseen = RegressionEpisodes(Sinusoids(), shots=10, query_shots=10, seed=1)
    found = evaluate(meta, unseen, tasks=100, at_steps=(0, 5))
    assert found[5].mean() < 0.4 * found[0].mean()
