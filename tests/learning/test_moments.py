"""An inner Adam whose second moments outlive a task, against one `torch.optim.Adam` for all tasks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from fomaml.checkpoint import load_weights, save_weights
from fomaml.data.source import ClassSource
from fomaml.engines import meta_gradient
from fomaml.episodes import Episodes
from fomaml.errors import InputError
from fomaml.learning.adapt import Adam
from fomaml.learning.algorithms import FOMAML, ProtoMAML, Reptile
from fomaml.models import MLP
from fomaml.tasks import Examples, one
from fomaml.train import train

LR, META_LR, STEPS, BATCH = 0.01, 0.5, 3, 4
CARRIED = Adam((0.0, 0.999), carried=True)
EXECUTIONS = [("loop", False), ("batched", False), ("loop", True), ("batched", True)]


def network():
    """Without biases before batch norm: their gradients are rounding errors, which Adam divides by their own size."""
    torch.manual_seed(1)
    block = (
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    return nn.Sequential(*block, nn.Flatten(), nn.Linear(4 * 7 * 7, 3)).double()


def episodes():
    inputs = torch.randn(50, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return Episodes(ClassSource(inputs, torch.arange(50) % 5), ways=3, shots=3, query_shots=2, seed=0)


def far(found, expected):
    return max((f - e).abs().max().item() for f, e in zip(found.parameters(), expected.parameters()))


def published(model, episodes, iterations):
    """Reptile, a task at a time (Nichol et al. 2018, algorithm 1), one Adam for all of them, as in their code."""
    theta, phi = copy.deepcopy(model), copy.deepcopy(model)
    inner = torch.optim.Adam(phi.parameters(), lr=LR, betas=(0.0, 0.999))
    for iteration in range(iterations):
        support = one(episodes.batch(iteration, 1), 0).support
        phi.load_state_dict(theta.state_dict())
        for step in range(STEPS):
            inputs, targets = reference.minibatch(support, BATCH, step)
            inner.zero_grad()
            F.cross_entropy(phi(inputs), targets).backward()
            inner.step()
        with torch.no_grad():
            for ours, end in zip(theta.parameters(), phi.parameters()):
                ours += META_LR * (end - ours)
    return theta


def trained(optimizer, iterations, engine="loop", compile=False):
    model = network()
    learner = Reptile(model, LR, STEPS, optimizer=optimizer, inner_batch_size=BATCH)
    outer = torch.optim.SGD(model.parameters(), lr=META_LR)
    list(
        train(
            learner,
            episodes(),
            outer,
            iterations=iterations,
            meta_batch_size=1,
            engine=engine,
            compile=compile,
        )
    )
    return learner


@pytest.mark.parametrize(("engine", "compile"), EXECUTIONS)
def test_reptile_with_one_adam_for_all_tasks(engine, compile):
    expected = published(network(), episodes(), 5)
    assert far(trained(CARRIED, 5, engine, compile).model, expected) < 1e-10
    assert far(expected, network()) > 0.01


def test_a_fresh_adam_for_each_task_ends_elsewhere():
    expected = published(network(), episodes(), 5)
    assert far(trained(Adam((0.0, 0.999)), 5).model, expected) > 1e-3
    first = published(network(), episodes(), 1)
    assert far(trained(Adam((0.0, 0.999)), 1).model, first) < 1e-10  # but for the first task


@pytest.mark.parametrize(("engine", "compile"), EXECUTIONS)
@pytest.mark.parametrize(("preset", "slow"), [(FOMAML, reference.fomaml), (Reptile, reference.reptile)])
def test_every_task_of_a_meta_batch_starts_from_what_was_kept(preset, slow, engine, compile):
    learner = preset(network(), LR, STEPS, optimizer=CARRIED, inner_batch_size=BATCH)
    learner.carry_moments(episodes().batch(7, 2))
    learner.carry_moments(episodes().batch(9, 2))
    kept = learner.moments.state(learner.adapted)

    def adam(groups):
        made = torch.optim.Adam(groups, betas=(0.0, 0.999))
        for group, (name, state) in zip(made.param_groups, kept.items(), strict=True):
            [parameter] = group["params"]
            square = state["square"].clone()
            made.state[parameter] = {
                "step": torch.tensor(2.0 * STEPS), "exp_avg": torch.zeros_like(square), "exp_avg_sq": square
            }  # fmt: skip
        return made

    tasks = episodes().batch(0, 3)
    found = meta_gradient(learner, tasks, engine=engine, compile=compile)
    rates = dict.fromkeys(learner.adapted, LR)
    answers = [
        slow(learner.model, one(tasks, i), F.cross_entropy, rates, STEPS, optimizer=adam, batch=BATCH)
        for i in range(3)
    ]
    for name, gradient in found.gradients.items():
        expected = sum(answer.gradients[name] for answer in answers) / 3
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)
    assert learner.moments.state(learner.adapted)["5.bias"]["weight"].item() == pytest.approx(
        1 - 0.999 ** (2 * STEPS)
    )


@pytest.mark.parametrize("listed", [False, True], ids=["stacked", "listed"])
@pytest.mark.parametrize(("engine", "compile"), EXECUTIONS)
def test_a_meta_gradient_has_the_moments_of_the_first_task(engine, compile, listed):
    learner = FOMAML(network(), LR, STEPS, optimizer=CARRIED, inner_batch_size=BATCH)
    learner.carry_moments(episodes().batch(7, 1))
    stacked = tasks = episodes().batch(0, 4)
    if listed:  # tasks of two shapes, the smaller ones first
        tasks = [one(tasks, i) for i in range(4)]
        tasks[2:] = [task._replace(query=Examples(*(t[:-1] for t in task.query))) for task in tasks[2:]]
    found = meta_gradient(learner, tasks, engine=engine, tasks_at_once=2, compile=compile)
    learner.carry_moments(stacked)
    kept = dict(learner.moments.named_buffers())
    assert found.moments.keys() == kept.keys()
    for name, value in found.moments.items():
        torch.testing.assert_close(value, kept[name], rtol=1e-10, atol=1e-14)


def test_training_adapts_to_no_task_twice(monkeypatch):
    class Counting(nn.Linear):
        calls = 0

        def forward(self, inputs):
            Counting.calls += 1
            return super().forward(inputs)

    data = Episodes(
        ClassSource(torch.randn(50, 6), torch.arange(50) % 5), ways=3, shots=3, query_shots=2, seed=0
    )
    passes = []
    for carried in (False, True):
        model = Counting(6, 3)
        learner = FOMAML(model, LR, STEPS, optimizer=Adam((0.0, 0.999), carried=carried))
        outer = torch.optim.SGD(model.parameters(), lr=META_LR)
        records = train(learner, data, outer, iterations=9, meta_batch_size=2, engine="loop", measure_every=9)
        next(records)
        before = Counting.calls
        next(records)
        passes.append(Counting.calls - before)
    assert passes == [2 * (STEPS + 1)] * 2


def test_the_moments_are_saved_with_the_weights(tmp_path):
    learner = trained(CARRIED, 2)
    save_weights(tmp_path / "weights.safetensors", learner)
    other = Reptile(network(), LR, STEPS, optimizer=CARRIED, inner_batch_size=BATCH)
    support = one(episodes().batch(3, 1), 0).support
    assert far(other.adapt(support), learner.adapt(support)) > 1e-3
    load_weights(tmp_path / "weights.safetensors", other)
    assert far(other.adapt(support), learner.adapt(support)) == 0


def test_without_a_carried_adam_there_are_none():
    learner = Reptile(MLP(2, 2), LR, 1, optimizer=Adam())
    assert set(learner.state_dict()) == {f"model.{name}" for name in learner.model.state_dict()}


def test_a_carried_adam_refuses_another_start():
    with pytest.raises(InputError, match="a carried Adam has its moments by θ"):
        ProtoMAML(MLP(2, 2), LR, 1, optimizer=CARRIED, head="head")
