"""What a loss may do with the model that it is given, and what it changes: nothing but what it computes."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from compiling import untouched
from fomaml import FOMAML, MAML, Examples, InputError, Task, evaluate, meta_gradient, train
from fomaml.engines import plan
from fomaml.tasks import stack
from fomaml.trees import leaves
from shapes import close, labels, number, same_gradients, slow

LR, STEPS = 0.1, 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def drawn(size: int = 4, examples: int = 5) -> list[Task]:
    return [
        Task(
            *(Examples(number(20 * i + j, examples, 3), number(20 * i + j + 5, examples, 1)) for j in (0, 1))
        )
        for i in range(size)
    ]


def square(found, examples):
    return (found - examples.targets).square().mean()


MODEL = net()
# how a loss may compute with the model; the last one of each pair says whether it is taken
WAYS = {
    "forward": (lambda f, e: square(f(e.inputs), e), True),
    "the model itself": (lambda f, e: square(MODEL(e.inputs), e), True),
    "its layers": (lambda f, e: square(f[2](f[1](f[0](e.inputs))), e), True),
    "a checkpoint of forward": (lambda f, e: square(checkpoint(f, e.inputs, use_reentrant=False), e), True),
    "a checkpoint of layers": (
        lambda f, e: square(f[2](checkpoint(MODEL[:2], e.inputs, use_reentrant=False)), e), True
    ),
    "a checkpoint of the model": (lambda f, e: square(checkpoint(MODEL, e.inputs, use_reentrant=False), e), False),
}  # fmt: skip


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_it_computes_with_the_weights_of_the_task_or_is_refused(way, first_order):
    loss, taken = WAYS[way]
    learner = FOMAML(MODEL, LR, STEPS, loss=loss, first_order=first_order)
    tasks = drawn()
    if not taken:
        with pytest.raises(InputError, match="forward, or a module of it, is what the loss may checkpoint"):
            meta_gradient(learner, stack(tasks), engine="loop")
        return
    expected = slow(net(), tasks, WAYS["forward"][0], LR, STEPS, first_order)
    same_gradients(meta_gradient(learner, stack(tasks), engine="loop").gradients, expected.gradients)


class Counting(nn.Module):
    """Its outputs depend on how often it ran, which a buffer says that is written in place."""

    def __init__(self):
        super().__init__()
        self.net = net()
        self.register_buffer("times", torch.zeros(()).double())

    def forward(self, inputs):
        self.times += 1
        return self.net(inputs) * self.times


class Given:
    def __init__(self, tasks):
        self.tasks = tasks

    def batch(self, start, number_of_them):
        return stack(self.tasks[start : start + number_of_them])


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_to_be_measured_changes_nothing(engine):
    def by_hand(forward, examples):
        return square(forward(examples.inputs), examples)

    learner = FOMAML(Counting(), 0.001, STEPS, loss=lambda f, e: square(f(e.inputs), e))
    asked = {"tasks": 4, "at_steps": (0, 1, 2), "engine": engine}
    alone = evaluate(learner, Given(drawn()), **asked)
    together = evaluate(learner, Given(drawn()), metric=["loss", "mse", by_hand], **asked)
    for steps, losses in alone.items():
        for name in ("loss", "mse", "by_hand"):
            close(together[name][steps], losses)


def test_the_inputs_of_the_user_stay_as_they_are():
    def loss(forward, examples):
        found = forward(examples.inputs.requires_grad_())
        return torch.autograd.grad(found.sum(), examples.inputs, create_graph=True)[0].square().mean()

    tasks = drawn()
    learner = FOMAML(net(), LR, STEPS, loss=loss)
    learner.adapt(tasks[0].support)
    meta_gradient(learner, tasks)
    assert not any(part.inputs.requires_grad for task in tasks for part in task)


def test_a_dict_of_ones_own_goes_as_keywords_too():
    tasks = [Task(*(Examples({"input": part.inputs}, part.targets) for part in task)) for task in drawn()]
    learner = FOMAML(
        net(), LR, 1, loss=lambda f, e: square(f({**e.inputs, "input": 2 * e.inputs["input"]}), e)
    )
    same = FOMAML(net(), LR, 1, loss=lambda f, e: square(f(2 * e.inputs["input"]), e))
    close(meta_gradient(learner, tasks).query_losses, meta_gradient(same, tasks).query_losses)


class Annealed:
    def __init__(self):
        self.weight = 0.0

    def __call__(self, forward, examples):
        return (
            square(forward(examples.inputs), examples)
            + self.weight * forward(examples.inputs).square().mean()
        )

    def set(self, value):
        self.weight = value


def in_a_dict():
    held = {"weight": 0.0}

    def loss(forward, examples):
        found = forward(examples.inputs)
        return square(found, examples) + held["weight"] * found.square().mean()

    return loss, lambda value: held.update(weight=value)


def in_an_object():
    loss = Annealed()
    return loss, loss.set


def in_a_method():
    loss = Annealed()
    return loss.__call__, loss.set


def in_a_partial():
    loss = Annealed()
    return functools.partial(loss), loss.set


@pytest.mark.parametrize("make", [in_a_dict, in_an_object, in_a_method, in_a_partial])
def test_compiled_it_follows_what_a_loss_reads(make, monkeypatch):
    untouched(monkeypatch)
    loss, change = make()
    learner = FOMAML(net(), LR, STEPS, loss=loss)
    for value in (0.0, 5.0, 1.0):
        change(value)
        compiled = meta_gradient(learner, stack(drawn()), engine="batched", compile=True)
        close(compiled.query_losses, meta_gradient(learner, drawn(), engine="loop").query_losses)


# --- doors ------------------------------------------------------------------------------------------


class Tasks(Dataset):
    """Tasks by their index, of unequal sizes."""

    def __init__(self, sizes=(3, 5, 4, 3)):
        self.tasks = [drawn(1, size)[0] for size in sizes]

    def __len__(self):
        return len(self.tasks)

    def __getitem__(self, index):
        return self.tasks[index]


@pytest.mark.parametrize(
    "make", [Tasks, lambda: DataLoader(Tasks(), 2, collate_fn=list), lambda: Tasks().tasks]
)
def test_tasks_of_any_sizes_come_from_anything(make):
    models = []
    for given in (make(), Tasks().tasks):
        learner = FOMAML(net(), LR, STEPS, F.mse_loss)
        optimizer = torch.optim.SGD(learner.parameters(), 0.1)
        list(train(learner, given, optimizer, iterations=3, meta_batch_size=4))
        models.append(learner.model)
    for p, q in zip(*(model.parameters() for model in models)):
        close(p, q)


def pairs(seed: int, *shape: int):
    return tuple(number(seed + i, *shape, 2) for i in range(2))


def trained(tasks) -> None:
    learner = FOMAML(net(), LR, 1, F.mse_loss)
    list(train(learner, tasks, torch.optim.SGD(learner.parameters(), 1), iterations=1, meta_batch_size=2))


def mixed():
    return FOMAML(net(), LR, 1, F.mse_loss, output=0)


WRONG = {
    "a criterion as the loss": (lambda: FOMAML(net(), LR, 1, loss=F.cross_entropy), "is the criterion"),
    "a module as the loss": (lambda: FOMAML(net(), LR, 1, loss=nn.MSELoss()), "is the criterion"),
    "a part of a tensor": (lambda: meta_gradient(mixed(), drawn()), "the model returns a tensor .* which has no parts"),
    "no names": (
        lambda: meta_gradient(mixed(), [Task(*(Examples({0: number(0, 3, 3)}, labels(0, 1, 3)) for _ in range(2)))]),
        r"whose keys go to the model as keywords; got the keys \[0\]",
    ),
    "nothing": (lambda: meta_gradient(mixed(), []), "there are no tasks: got an empty list"),
    "not all are tasks": (lambda: meta_gradient(mixed(), [*drawn(), None]), "item 4 of a list of tasks is a NoneType"),
    "a task to adapt to": (lambda: FOMAML(net(), LR, 1).adapt(drawn()[0]), "got a Task: give its .support"),
    "two readings": (
        lambda: meta_gradient(mixed(), [(pairs(0, 3, 4), pairs(2, 3, 4)), (pairs(4, 3, 4), pairs(6, 3, 4))]),
        "may be two tasks, or a batch of tasks whose inputs and targets are pairs",
    ),
    "a DataLoader that stacks": (lambda: trained(DataLoader(Tasks(), 2)), "give it collate_fn=list"),
    "a metric of outputs": (
        lambda: evaluate(
            FOMAML(net(), LR, 1, loss=lambda f, e: square(f(e.inputs), e)), Given(drawn()), tasks=1,
            metric=lambda outputs, targets: (outputs - targets).abs().mean(),
        ),
        r"of a learner with a loss= it is called with \(forward, examples\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", WRONG)
def test_what_is_wrong_is_told(row):
    call, message = WRONG[row]
    with pytest.raises(InputError, match=message):
        call()


def test_shapes_of_every_kind_of_task_are_looked_at():
    """Also of those that are few, and of what comes later to a plan that is kept."""
    model = FOMAML(net(), LR, 1, F.mse_loss)
    odd = Task(*(Examples(number(9, 3, 3), number(9, 3)) for _ in range(2)))
    for engine in ("loop", "batched", "factored"):
        with pytest.raises(InputError, match=r"outputs of shape \(3, 1\) with targets of shape \(3,\)"):
            meta_gradient(model, [*drawn(3, 9), odd], engine=engine)
        own = plan(model, stack(drawn()), engine=engine)
        with pytest.raises(InputError, match=r"outputs of shape \(3, 1\) with targets of shape \(3,\)"):
            own(stack([odd, odd]))


def test_a_task_without_weight_may_be_anything():
    bad = drawn(1)[0]
    bad = Task(bad.support, Examples(bad.query.inputs, bad.query.targets * torch.nan))
    learner = FOMAML(net(), LR, STEPS, F.mse_loss)
    kept = drawn(3)
    found = meta_gradient(
        learner, [*kept, bad], task_weights=lambda task: float(task.query.targets.isfinite().all())
    )
    same_gradients(found.gradients, meta_gradient(learner, kept).gradients)


def test_an_object_goes_to_a_criterion_as_it_is():
    class Answer(dict):
        @property
        def logits(self):
            return self["logits"]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, inputs):
            return Answer(logits=self.net(inputs))

    tasks = drawn()
    for make in (FOMAML, MAML):
        object_ = make(Model(), LR, STEPS, lambda answer, targets: F.mse_loss(answer.logits, targets))
        plain = make(net(), LR, STEPS, F.mse_loss)
        found, expected = (meta_gradient(learner, stack(tasks)) for learner in (object_, plain))
        close([*found.gradients.values()], [*expected.gradients.values()])
        close(found.query_outputs["logits"], expected.query_outputs)


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, inputs):
        inputs -= 0.5
        return self.net(inputs)


class OfPair(Centred):
    def forward(self, first, other):
        return super().forward(first + other["rest"].mul_(2))


def with_rest(task: Task) -> Task:
    return Task(*(part._replace(inputs=(part.inputs, {"rest": part.inputs.clone()})) for part in task))


def clamped(outputs, targets):
    return F.mse_loss(outputs, targets.clamp_(-0.1, 0.1))


def doubled(forward, examples):
    return F.mse_loss(forward(examples.inputs.mul_(2)), examples.targets)


WRITING = {  # model, choices, tasks out of plain ones, what is written into
    "forward": (Centred, {"criterion": F.mse_loss}, lambda task: task, "inputs"),
    "forward, nested": (OfPair, {"criterion": F.mse_loss}, with_rest, r"inputs\[1\]\['rest'\]"),
    "criterion": (net, {"criterion": clamped}, lambda task: task, "targets"),
    "loss": (net, {"loss": doubled}, lambda task: task, "inputs"),
}


@pytest.mark.parametrize("case", WRITING)
def test_what_writes_into_the_examples_is_refused(case):
    """Each inner step and each call would find other ones; those of the user stay as they are."""
    model, choices, form, place = WRITING[case]
    tasks, kept = ([form(task) for task in drawn(2)] for _ in range(2))
    batch = stack(tasks)

    learner = FOMAML(model(), LR, STEPS, **choices)
    for engine in ("auto", "loop", "batched"):
        with pytest.raises(InputError, match=f"writes into the query {place}"):
            meta_gradient(learner, batch, engine=engine)
    with pytest.raises(InputError, match=f"writes into the query {place}"):
        evaluate(learner, Given(tasks), tasks=2)
    with pytest.raises(InputError, match=f"writes into the support {place}"):
        learner.adapt(tasks[0].support)
    close(leaves(stack(kept)), leaves(batch))
    close(leaves(kept[0]), leaves(tasks[0]))
    with pytest.raises(InputError, match=f"writes into the support {place}"):
        learner(batch)


def written_error(outputs, targets):
    return outputs.sub_(targets).square().mean()


def written_examples(forward, examples):
    found = square(forward(examples.inputs), examples)
    examples.inputs.zero_()
    return found


@pytest.mark.parametrize("choices, metric", [
    ({"criterion": F.mse_loss}, written_error),
    ({"loss": lambda forward, examples: square(forward(examples.inputs), examples)}, written_examples),
])  # fmt: skip
def test_a_metric_that_writes_changes_neither_the_tasks_nor_other_metrics(choices, metric):
    tasks, kept = stack(drawn(2)), stack(drawn(2))
    held = SimpleNamespace(batch=lambda start, size: tasks.map(lambda t: t[start : start + size]))
    learner = FOMAML(net(), LR, STEPS, **choices)
    found = evaluate(learner, held, tasks=2, at_steps=[0, 2], metric=[metric, "mse"])
    for steps, scores in found["mse"].items():
        close([found[metric.__name__][steps]], [scores])
    close(leaves(tasks), leaves(kept))
