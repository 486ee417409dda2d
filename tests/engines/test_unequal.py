"""Meta-batches of tasks of any sizes: as the tasks one by one, whatever the engine, the order and the grouping."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiling import untouched
from fomaml import (
    FOMAML,
    MAML,
    InputError,
    ProtoMAML,
    Reptile,
    ZeroHeadMAML,
    evaluate,
    meta_gradient,
    train,
)
from fomaml.baselines import nearest_centroid
from fomaml.engines import plan
from fomaml.tasks import Examples, Task, stack
from shapes import close, labels, number, same_gradients, slow

STEPS, LR = 2, 0.2
SIZES = [(5, 3), (2, 6), (5, 3), (1, 1), (2, 6), (7, 2), (5, 3)]  # of support and query sets


def tasks(ways: int = 3, sizes=SIZES) -> list[Task]:
    return [
        Task(*(Examples(number(100 * i + n, n, 4), labels(100 * i + n, ways, n)) for n in size))
        for i, size in enumerate(sizes)
    ]


def model(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def loss(forward, examples):
    return F.cross_entropy(forward(examples.inputs), examples.targets)


WEIGHTS = {
    "equal": ("equal", lambda task: 1.0),
    "examples": ("examples", lambda task: float(len(task.query.targets))),
    "function": (
        lambda task: len(task.support.targets) ** 2,
        lambda task: float(len(task.support.targets) ** 2),
    ),
    "of labels": (
        lambda task: task.query.targets.sum() + 0.5,
        lambda task: task.query.targets.sum().item() + 0.5,
    ),
}
ENGINES = ["loop", "batched", "factored"]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_list_of_tasks_is_as_they_are_one_by_one(engine, weights):
    asked, by_hand = WEIGHTS[weights]
    own = tasks()
    expected = slow(
        model(), own, loss, LR, STEPS, weights=[*map(by_hand, own)], outputs=lambda f, e: f(e.inputs)
    )
    for tasks_at_once in (None, 1, 2):
        found = meta_gradient(
            FOMAML(model(), LR, STEPS), own, engine=engine, task_weights=asked, tasks_at_once=tasks_at_once
        )
        same_gradients(found.gradients, expected.gradients)
        close(found.query_losses, expected.losses)
        assert isinstance(found.query_outputs, list)
        close(found.query_outputs, expected.outputs)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_stacked_batch_is_weighted_too(weights, monkeypatch):
    untouched(monkeypatch)
    asked, by_hand = WEIGHTS[weights]
    own = tasks(sizes=[(5, 3)] * 4)
    expected = slow(model(), own, loss, LR, STEPS, weights=[*map(by_hand, own)])
    for compile in (False, True):
        found = meta_gradient(FOMAML(model(), LR, STEPS), stack(own), task_weights=asked, compile=compile)
        same_gradients(found.gradients, expected.gradients)
        close(found.query_losses, expected.losses)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_second_order_and_the_plain_meta_loss(engine):
    own = tasks()
    expected = slow(model(), own, loss, LR, STEPS, first_order=False)
    same_gradients(meta_gradient(MAML(model(), LR, STEPS), own, engine=engine).gradients, expected.gradients)
    learner = MAML(model(), LR, STEPS)
    learner(own).backward()
    same_gradients({n: p.grad for n, p in learner.model.named_parameters()}, expected.gradients)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_makes_no_difference(seed):
    own = tasks()
    order = random.Random(seed).sample(range(len(own)), len(own))
    learner = FOMAML(model(), LR, STEPS)
    first, other = meta_gradient(learner, own), meta_gradient(learner, [own[row] for row in order])
    same_gradients(other.gradients, first.gradients)
    close(other.query_losses, first.query_losses[order])
    close(other.support_losses, first.support_losses[order])
    close(other.query_outputs, [first.query_outputs[row] for row in order])


@pytest.mark.parametrize("make", [ProtoMAML, ZeroHeadMAML])
@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_numbers_of_ways_may_differ(make, engine):
    own = [*tasks(2, [(6, 4)] * 2), *tasks(4, [(6, 4), (9, 5)])]
    learner = make(model(), LR, STEPS, head="2")
    alone = [meta_gradient(learner, stack([task]), engine="loop") for task in own]
    found = meta_gradient(learner, own, engine=engine)
    for name, gradient in found.gradients.items():
        close(gradient, torch.stack([one.gradients[name] for one in alone]).mean(0))
    for outputs, one in zip(found.query_outputs, alone, strict=True):
        close(outputs, one.query_outputs[0])


def test_shapes_that_come_back_are_compiled_and_others_are_not(monkeypatch):
    untouched(monkeypatch)
    from fomaml.engines.compiled import cache

    made = []
    original = cache.function
    monkeypatch.setattr(cache, "function", lambda *a, **k: made.append(a[1]) or original(*a, **k))
    learner = FOMAML(model(), LR, STEPS)
    own = plan(learner, tasks(), compile=True)
    expected = slow(model(), tasks(), loss, LR, STEPS)
    for times in (0, 4, 8):  # four shapes, each compiled from the second time on
        same_gradients(own(tasks()).gradients, expected.gradients)
        assert len(made) == times
    again = plan(learner, tasks(), compile=True)
    again.seen |= own.seen  # as a run that goes on
    again(tasks())
    assert len(made) == 12


class Given:
    """Tasks of unequal sizes by their index, over and over again."""

    def __init__(self, own: list[Task]):
        self.own = own

    def batch(self, start, number):
        return [self.own[index % len(self.own)] for index in range(start, start + number)]


@pytest.mark.parametrize("weights", ["equal", "examples"])
def test_train_is_as_by_hand(weights):
    own = tasks()
    learner = FOMAML(model(), LR, STEPS)
    optimizer = torch.optim.SGD(learner.parameters(), 0.1)
    slow_model = model()
    records = train(learner, Given(own), optimizer, iterations=3, meta_batch_size=5, task_weights=weights)
    for iteration, record in enumerate(records):
        batch = Given(own).batch(5 * iteration, 5)
        each = [float(len(task.query.targets)) if weights == "examples" else 1.0 for task in batch]
        outputs = {"outputs": lambda f, e: (f(e.inputs).argmax(1) == e.targets).double().mean()}
        before = slow(slow_model, batch, loss, LR, 0, **outputs)
        found = slow(slow_model, batch, loss, LR, STEPS, weights=each, **outputs)
        close(record.meta_loss, (found.losses * torch.tensor(each).double()).sum() / sum(each))
        close(record.before, torch.stack(before.outputs).mean())
        close(record.after, torch.stack(found.outputs).mean())
        with torch.no_grad():
            for name, p in slow_model.named_parameters():
                p -= 0.1 * found.gradients[name]
    for p, q in zip(learner.model.parameters(), slow_model.parameters()):
        close(p, q)


def test_an_iterable_of_unequal_tasks_trains_too():
    own = tasks()
    learners = [FOMAML(model(), LR, STEPS) for _ in range(2)]
    for learner, episodes in zip(learners, (own, Given(own))):
        optimizer = torch.optim.SGD(learner.parameters(), 0.1)
        list(train(learner, episodes, optimizer, iterations=3, meta_batch_size=5))
    for p, q in zip(*(learner.parameters() for learner in learners)):
        close(p, q)


@pytest.mark.parametrize("tasks_at_once", [1, 3, 100])
def test_evaluate_scores_each_task(tasks_at_once):
    own = tasks()
    found = evaluate(
        FOMAML(model(), LR, STEPS),
        Given(own),
        tasks=9,
        at_steps=(0, 2),
        tasks_at_once=tasks_at_once,
        metric=["accuracy", "loss", lambda outputs, targets: outputs.square().mean()],
    )
    batch = Given(own).batch(0, 9)
    for steps in (0, 2):
        right = slow(
            model(),
            batch,
            loss,
            LR,
            steps,
            outputs=lambda f, e: (f(e.inputs).argmax(1) == e.targets).double().mean(),
        )
        size = slow(model(), batch, loss, LR, steps, outputs=lambda f, e: f(e.inputs).square().mean())
        close(found["accuracy"][steps], torch.stack(right.outputs))
        close(found["loss"][steps], right.losses)
        close(found["<lambda>"][steps], torch.stack(size.outputs))


def test_reptile_of_unequal_tasks():
    own = tasks()
    learner = Reptile(model(), LR, STEPS)
    found = meta_gradient(learner, own, task_weights="examples")
    each = [len(task.query.targets) for task in own]
    adapted = [learner.adapt(task.support) for task in own]
    for name, p in learner.model.named_parameters():
        moved = torch.stack(
            [w * (p.detach() - a.get_parameter(name).detach()) for w, a in zip(each, adapted)]
        )
        close(found.gradients[name], moved.sum(0) / sum(each))


def test_the_nearest_centroid_takes_them():
    own = tasks()
    found = nearest_centroid(Given(own), tasks=len(own))
    for score, (support, query) in zip(found, own):
        far = [
            [
                (x - support.inputs[support.targets == c].mean(0)).norm().item()
                for c in support.targets.unique()
            ]
            for x in query.inputs
        ]
        guess = torch.stack([support.targets.unique()[torch.tensor(row).argmin()] for row in far])
        assert score == (guess == query.targets).double().mean()


WRONG = {
    "a name": ("size", "task_weights"),
    "negative": (lambda task: -1.0, "the weight of a task must be a finite number of 0 or more, got -1.0"),
    "no number": (lambda task: None, "the weight of a task must be a finite number of 0 or more, got None"),
    "nan": (lambda task: float("nan"), "the weight of a task must be a finite number of 0 or more, got nan"),
    "all nothing": (lambda task: 0, "the weights of all 7 tasks of a meta-batch are 0"),
}


@pytest.mark.parametrize("row", WRONG)
def test_weights_that_mean_nothing_are_told(row):
    asked, message = WRONG[row]
    with pytest.raises(InputError, match=message):
        meta_gradient(FOMAML(model(), LR, STEPS), tasks(), task_weights=asked)


def test_a_weight_of_0_leaves_a_task_out():
    own = tasks()
    found = meta_gradient(
        FOMAML(model(), LR, STEPS), own, task_weights=lambda task: float(len(task.query.targets) != 3)
    )
    kept = [task for task in own if len(task.query.targets) != 3]
    same_gradients(found.gradients, meta_gradient(FOMAML(model(), LR, STEPS), kept).gradients)


def test_a_single_list_of_equal_tasks_is_a_list_too():
    own = tasks(sizes=[(5, 3)] * 3)
    found = meta_gradient(FOMAML(model(), LR, STEPS), own)
    expected = meta_gradient(FOMAML(model(), LR, STEPS), stack(own))
    same_gradients(found.gradients, expected.gradients)
    close(found.query_outputs, [*expected.query_outputs])


def test_a_task_that_is_wrong_is_told():
    own = tasks()
    wrong = Task(Examples(own[0].support.inputs, own[0].support.targets[:-1]), own[0].query)
    with pytest.raises(InputError, match="differ in their numbers of examples"):
        meta_gradient(FOMAML(model(), LR, STEPS), [*own, wrong])
    wide = own[3]._replace(support=Examples(number(0, 2, 4), torch.tensor([0, 5])))
    with pytest.raises(InputError, match="too narrow for 6 ways"):
        meta_gradient(FOMAML(model(), LR, STEPS), [*own, wide])
