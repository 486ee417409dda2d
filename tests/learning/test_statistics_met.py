"""The statistics of batches that a meta-gradient tells of, which running ones are moved towards."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from fomaml.data.source import ClassSource
from fomaml.engines import meta_gradient
from fomaml.episodes import Episodes
from fomaml.learning.algorithms import FOMAML, MAML, MAMLPlusPlus, Reptile, iMAML
from fomaml.learning.contracts import PlainObjective
from fomaml.learning.objectives import QueryLoss
from fomaml.learning.statistics import move
from fomaml.models import BatchNorm
from fomaml.tasks import Examples, one
from fomaml.train import train

LR, STEPS = 0.1, 2
EXECUTIONS = [("loop", False), ("batched", False), ("loop", True), ("batched", True)]
POLICIES = {"running": {"policy": "running"}, "per-step": {"policy": "per-step", "steps": STEPS}}


def images(policy, pool=True):
    """Blocks as the kernels know them, and one that they do not."""
    torch.manual_seed(1)
    norm = partial(BatchNorm, 4, **POLICIES[policy])
    first = nn.Conv2d(1, 4, 3, padding=1), norm(), nn.ReLU(), *[nn.MaxPool2d(2)] * pool
    return nn.Sequential(*first, nn.Conv2d(4, 4, 3), norm(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def dense():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 40), BatchNorm(40, policy="running"), nn.ReLU(), nn.Linear(40, 3))


def made(model, shape, dtype=torch.float64):
    inputs = torch.randn(50, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model = model.to(dtype)
    model(inputs[:2].to(dtype))
    source = ClassSource(inputs.to(dtype), torch.arange(50) % 5)
    return model, Episodes(source, ways=3, shots=3, query_shots=2, seed=0)


def assert_same_moves(learner, tasks, found, first=None, rtol=1e-9, atol=1e-12):
    """What was found moves the model's statistics as adapting to the first task does."""
    other = copy.deepcopy(learner)
    before = {name: buffer.clone() for name, buffer in learner.model.named_buffers()}
    other.update_statistics(tasks if first is None else first)
    move(learner.model, found.statistics)
    moved = dict(learner.model.named_buffers())
    for name, buffer in other.model.named_buffers():
        torch.testing.assert_close(moved[name], buffer, rtol=rtol, atol=atol)
        assert (buffer != before[name]).all()


@pytest.mark.parametrize(("policy", "pool"), [("running", True), ("per-step", True), ("running", False)])
@pytest.mark.parametrize(("engine", "compile"), EXECUTIONS)
def test_a_meta_gradient_has_the_statistics_of_the_first_task(engine, compile, policy, pool):
    model, episodes = made(images(policy, pool), (1, 8, 8))
    learner, tasks = FOMAML(model, LR, STEPS), episodes.batch(0, 4)
    found = meta_gradient(learner, tasks, engine=engine, compile=compile, tasks_at_once=2)
    assert [step for _, step, _ in found.statistics] == [0, 0, 1, 1, 2, 2]
    assert_same_moves(learner, tasks, found)


@pytest.mark.parametrize(
    ("engine", "compile"),
    [
        ("loop", False),
        ("batched", False),
        ("factored", False),
        # through torch's compiler
        pytest.param("factored", True, marks=pytest.mark.long),
    ],
)
def test_of_dense_layers(engine, compile):
    model, episodes = made(dense(), (64,))
    learner, tasks = FOMAML(model, LR, STEPS), episodes.batch(0, 4)
    assert_same_moves(learner, tasks, meta_gradient(learner, tasks, engine=engine, compile=compile))


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize(
    "preset",
    [MAML, Reptile, partial(iMAML, strength=2.0), partial(MAMLPlusPlus, multi_step_iterations=5),
     partial(FOMAML, inner_batch_size=4)],
    ids=["maml", "reptile", "imaml", "maml++", "minibatches"],
)  # fmt: skip
def test_of_all_objectives(preset, engine):
    model, episodes = made(images("per-step"), (1, 8, 8))
    learner, tasks = preset(model, LR, STEPS), episodes.batch(0, 3)
    assert_same_moves(learner, tasks, meta_gradient(learner, tasks, engine=engine))


@pytest.mark.parametrize(("engine", "compile"), EXECUTIONS)
def test_of_a_list_of_tasks_it_is_the_first_one(engine, compile):
    model, episodes = made(images("running"), (1, 8, 8))
    learner, stacked = FOMAML(model, LR, STEPS), episodes.batch(0, 4)
    tasks = [one(stacked, number) for number in range(4)]
    tasks[1:3] = [task._replace(query=Examples(*(t[:-1] for t in task.query))) for task in tasks[1:3]]
    found = meta_gradient(learner, tasks, engine=engine, compile=compile)
    assert_same_moves(learner, tasks, found, stacked)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_a_layer_that_runs_twice_moves_twice(engine):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm, self.head = (
                nn.Linear(64, 40),
                BatchNorm(40, policy="running"),
                nn.Linear(40, 3),
            )

        def forward(self, inputs):
            return self.head(self.norm(torch.tanh(self.norm(self.body(inputs)))))

    model, episodes = made(Twice(), (64,))
    learner, tasks = FOMAML(model, LR, STEPS), episodes.batch(0, 4)
    found = meta_gradient(learner, tasks, engine=engine)
    assert [(step, call) for _, step, call in found.statistics] == [
        (s, c) for s in range(3) for c in range(2)
    ]
    assert_same_moves(learner, tasks, found)


def test_in_lower_precision_they_are_float32():
    model, episodes = made(images("running"), (1, 8, 8), torch.float32)
    learner, tasks = FOMAML(model, LR, STEPS), episodes.batch(0, 4)
    found = meta_gradient(learner, tasks, engine="batched", autocast=torch.bfloat16)
    assert {each.dtype for pair in found.statistics.values() for each in pair} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_moves(learner, tasks, found, rtol=0.02, atol=0.02)


def test_there_are_none_where_nothing_is_moved():
    model, episodes = made(images("running"), (1, 8, 8))
    tasks = episodes.batch(0, 3)
    assert not meta_gradient(FOMAML(copy.deepcopy(model).eval(), LR, STEPS), tasks).statistics
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.policy = "batch"
    assert not meta_gradient(FOMAML(model, LR, STEPS), tasks).statistics


def test_nor_of_an_objective_that_takes_another_way():
    def shorter(problem):
        problem.steps -= 1
        outcome = QueryLoss()(problem)
        problem.steps += 1
        return outcome

    model, episodes = made(images("running"), (1, 8, 8))
    learner = FOMAML(model, LR, STEPS)
    learner.objective = PlainObjective(shorter)
    assert not meta_gradient(learner, episodes.batch(0, 3)).statistics


@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_training_adapts_to_no_task_twice(policy):
    class Counting(nn.Linear):
        calls = 0

        def forward(self, inputs):
            Counting.calls += 1
            return super().forward(inputs)

    norm = nn.Identity() if policy is None else BatchNorm(6, **POLICIES[policy])
    model, episodes = made(nn.Sequential(Counting(64, 6), norm, nn.Linear(6, 3)), (64,), torch.float32)
    outer = torch.optim.SGD(model.parameters(), lr=0.1)
    records = train(
        FOMAML(model, LR, STEPS),
        episodes,
        outer,
        iterations=9,
        meta_batch_size=2,
        engine="loop",
        measure_every=9,
    )
    next(records)
    before = Counting.calls
    next(records)
    assert Counting.calls - before == 2 * (STEPS + 1)
    if policy is not None:
        assert norm.mean.abs().min() > 0
