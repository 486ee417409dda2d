"""Inputs, targets and outputs that are nested: as a plain loop over the tasks, in every engine."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiling import untouched
from fomaml import ANIL, FOMAML, MAML, Episodes, InputError, Reptile, evaluate, meta_gradient, train
from fomaml.engines import plan
from fomaml.tasks import Examples, Task, one, stack
from shapes import Deep, Encoder, Pair, close, labels, number, same_gradients, slow

TASKS, STEPS, LR = 5, 3, 0.3


def encoder(seed: int, n: int) -> Examples:
    ids = labels(seed, 11, n, 7)
    return Examples(
        {"input_ids": ids, "attention_mask": (labels(seed + 1, 4, n, 7) > 0).long()}, labels(seed, 3, n)
    )


def pair(seed: int, n: int) -> Examples:
    inputs = number(seed, n, 3), number(seed + 1, n, 2)
    return Examples(inputs, {"kind": labels(seed, 3, n), "value": number(seed, n, 1)})


def deep(seed: int, n: int) -> Examples:
    views = number(seed, n, 2), number(seed + 1, n, 2)
    return Examples({"views": views, "context": {"time": number(seed + 2, n, 1)}}, labels(seed, 3, n))


def pair_loss(outputs, targets):
    kind, value = outputs
    return F.cross_entropy(kind, targets["kind"]) + F.mse_loss(value, targets["value"])


# model, examples, arguments of the learner, what is judged, by hand
ROWS = {
    "hugging-face": (
        Encoder, encoder, {"output": "logits"},
        lambda forward, e: F.cross_entropy(forward(**e.inputs).logits, e.targets),
        lambda forward, e: forward(**e.inputs).logits,
    ),
    "tuple": (
        Pair, pair, {"criterion": pair_loss},
        lambda forward, e: pair_loss(forward(*e.inputs), e.targets),
        lambda forward, e: forward(*e.inputs),
    ),
    "deep": (
        Deep, deep, {"output": lambda found: found["scores"]},
        lambda forward, e: F.cross_entropy(forward(**e.inputs)["scores"], e.targets),
        lambda forward, e: forward(**e.inputs)["scores"],
    ),
    "deep-by-key": (
        Deep, deep, {"output": "scores"},
        lambda forward, e: F.cross_entropy(forward(**e.inputs)["scores"], e.targets),
        lambda forward, e: forward(**e.inputs)["scores"],
    ),
}  # fmt: skip


def drawn(examples) -> list[Task]:
    return [Task(examples(10 * i, 6), examples(10 * i + 5, 4)) for i in range(TASKS)]


def made(row: str) -> tuple[nn.Module, list[Task], dict]:
    kind, examples, choices, *_ = ROWS[row]
    torch.manual_seed(0)
    return kind().double(), drawn(examples), choices


ENGINES = [("loop", False), ("batched", False), ("factored", False), ("batched", True)]


@pytest.mark.parametrize(("engine", "compile"), ENGINES)
@pytest.mark.parametrize("row", ROWS)
def test_first_order_is_that_of_a_plain_loop(row, engine, compile, monkeypatch):
    untouched(monkeypatch)
    model, tasks, choices = made(row)
    *_, loss, outputs = ROWS[row]
    expected = slow(model, tasks, loss, LR, STEPS, outputs=outputs)
    found = meta_gradient(FOMAML(model, LR, STEPS, **choices), stack(tasks), engine=engine, compile=compile)
    assert found.engine == engine
    same_gradients(found.gradients, expected.gradients)
    close(found.query_losses, expected.losses)
    own = found.query_outputs
    for index, expected_outputs in enumerate(expected.outputs):
        got = tuple(o[index] for o in own) if isinstance(own, tuple) else own[index]
        close(got, expected_outputs)


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("row", ROWS)
def test_second_order_is_that_of_a_plain_loop(row, engine):
    model, tasks, choices = made(row)
    loss = ROWS[row][3]
    expected = slow(model, tasks, loss, LR, STEPS, first_order=False)
    found = meta_gradient(MAML(model, LR, STEPS, **choices), stack(tasks), engine=engine)
    same_gradients(found.gradients, expected.gradients)
    learner = MAML(model, LR, STEPS, **choices)
    learner(stack(tasks)).backward()
    same_gradients({n: p.grad for n, p in model.named_parameters()}, expected.gradients)


@pytest.mark.parametrize("row", ROWS)
def test_adapt_gives_a_module_that_is_called_as_before(row):
    model, tasks, choices = made(row)
    *_, loss, outputs = ROWS[row]
    expected = slow(model, tasks[:1], loss, LR, STEPS, outputs=outputs)
    adapted = FOMAML(model, LR, STEPS, **choices).adapt(tasks[0].support)
    close(outputs(adapted, tasks[0].query), expected.outputs[0])


@pytest.mark.parametrize("row", ROWS)
def test_train_and_evaluate_take_them(row):
    model, tasks, choices = made(row)
    given = copy.deepcopy(model)
    learner = FOMAML(model, LR, 1, **choices)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    list(train(learner, tasks, optimizer, iterations=1, meta_batch_size=TASKS))
    expected = slow(given, tasks, ROWS[row][3], LR, 1)
    moved = {name: -(p - old) / 0.1 for (name, p), old in zip(model.named_parameters(), given.parameters())}
    same_gradients({n: m.detach() for n, m in moved.items()}, expected.gradients)

    class Given:
        def batch(self, start, tasks_asked):
            return stack(tasks[start : start + tasks_asked])

    found = evaluate(learner, Given(), tasks=TASKS, at_steps=[STEPS], metric="loss")[STEPS]
    close(found, slow(model, tasks, ROWS[row][3], LR, STEPS).losses)


def test_reptile_and_anil_take_them():
    model, tasks, choices = made("hugging-face")
    learner = Reptile(model, LR, STEPS, **choices)
    loop, batched = (meta_gradient(learner, stack(tasks), engine=engine) for engine in ("loop", "batched"))
    same_gradients(batched.gradients, loop.gradients)
    assert meta_gradient(ANIL(model, LR, STEPS, **choices), stack(tasks)).query_outputs.shape == (TASKS, 4, 3)


def test_statistics_of_the_support_set_join_nested_inputs():
    from fomaml import BatchNorm

    class Normed(nn.Module):
        def __init__(self, policy):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 4), BatchNorm(4, policy=policy), nn.Linear(4, 3)

        def forward(self, x, y):
            return self.last(torch.tanh(self.norm(self.first(x + y))))

    def examples(seed, n):
        return Examples({"x": number(seed, n, 3), "y": number(seed + 1, n, 3)}, labels(seed, 3, n))

    def flat(part):
        return Examples(part.inputs["x"] + part.inputs["y"], part.targets)

    class Plain(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, torch.zeros_like(x))

    tasks = [Task(examples(10 * i, 6), examples(10 * i + 5, 4)) for i in range(3)]
    for policy in ("batch", "support"):
        model = Normed(policy).double()
        for statistics in ("own", "support", "with-query"):
            points = [(2, statistics)]
            nested = FOMAML(model, LR, 2)
            plain = FOMAML(Plain(model), LR, 2)
            given = stack(tasks)
            [(losses, outputs)] = plan(nested, given, engine="batched").curve(given, points)
            same = stack([Task(*map(flat, task)) for task in tasks])
            [(expected_losses, expected)] = plan(plain, same, engine="loop").curve(same, points)
            close(losses, expected_losses)
            close(outputs, expected)


WRONG = {
    "no part of that name": (Encoder, encoder, {"output": "scores"}, "output='scores': the model returns a"),
    "no part of that number": (Pair, pair, {"output": 2}, "output=2: the model returns a tuple of 2"),
    "an object as it is": (Encoder, encoder, {}, "returns a Answer with .*'logits'.*: give output="),
    "several outputs and a loss of torch": (Deep, deep, {}, "a dict with 'scores', 'size', expected one tensor"),
    "several targets and a loss of torch": (Pair, pair, {"output": 0}, "one tensor of targets, and the task has 2"),
    "no name, number or function": (Pair, pair, {"output": 1.5}, "output is the name or the number .* got 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("row", WRONG)
def test_what_cannot_be_judged_is_told(row):
    kind, examples, choices, message = WRONG[row]
    with pytest.raises(InputError, match=message):
        meta_gradient(FOMAML(kind().double(), LR, 1, **choices), stack(drawn(examples)))


def test_inputs_that_forward_does_not_take_are_told():
    tasks = stack(drawn(encoder))
    wrong = tasks._replace(
        support=tasks.support._replace(
            inputs={**tasks.support.inputs, "tokens": tasks.support.inputs["input_ids"]}
        ),
        query=tasks.query._replace(inputs={**tasks.query.inputs, "tokens": tasks.query.inputs["input_ids"]}),
    )
    with pytest.raises(InputError, match=r"a dict of input_ids, attention_mask, tokens.*takes \(input_ids"):
        meta_gradient(FOMAML(Encoder().double(), LR, 1, output="logits"), wrong)
    with pytest.raises(
        InputError, match="the inputs are 1 tensor, which go to the model in order; forward of Pair"
    ):
        plain = stack(
            [Task(Examples(number(0, 3, 3), labels(0, 3, 3)), Examples(number(1, 3, 3), labels(1, 3, 3)))]
        )
        meta_gradient(FOMAML(Pair().double(), LR, 1, output=0), plain)


def test_sizes_that_differ_within_a_set_are_told_by_name():
    task = one(stack(drawn(encoder)), 0)
    short = {**task.support.inputs, "attention_mask": task.support.inputs["attention_mask"][:-1]}
    wrong = Task(Examples(short, task.support.targets), task.query)
    with pytest.raises(
        InputError, match=r"support inputs\['attention_mask'\] \(5, 7\) differ in their numbers"
    ):
        meta_gradient(FOMAML(Encoder().double(), LR, 1, output="logits"), [wrong])
    empty = Task(Examples({}, task.support.targets), task.query)
    with pytest.raises(InputError, match="a support set has no inputs: got an empty dict"):
        meta_gradient(FOMAML(Encoder().double(), LR, 1, output="logits"), [empty])
    text = Task(Examples({"input_ids": ["a"] * 6}, task.support.targets), task.query)
    with pytest.raises(InputError, match=r"got a str; support inputs\['input_ids'\]\[0\] is one"):
        meta_gradient(FOMAML(Encoder().double(), LR, 1, output="logits"), [text])


def test_episodes_of_one_tensor_stay_as_they_are():
    from fomaml import ClassSource

    episodes = Episodes(ClassSource(number(0, 20, 3), labels(0, 2, 20)), ways=2, shots=1, query_shots=1)
    assert isinstance(episodes.batch(0, 2).support.inputs, torch.Tensor)
