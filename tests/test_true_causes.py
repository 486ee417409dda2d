"""What cannot be learned from or scored is refused with its true cause; other errors come out as they are."""

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomaml.engines import meta_gradient
from fomaml.errors import InputError
from fomaml.evaluate import evaluate
from fomaml.train import train
from targets import (
    MAP,
    STEPS,
    TASKS,
    all_ignored,
    flat,
    labels,
    numbers,
    pixels,
    situation,
    some_ignored,
    truths,
)


class Fails(nn.Linear):
    """A forward pass of its own error, as of an index of the model's own."""

    failing = False

    def forward(self, inputs):
        if self.failing:
            raise IndexError("index 9 is out of range in the model")
        return super().forward(inputs)


def fails(outputs, targets):
    raise RuntimeError("a criterion of its own error")


class Refusal(NamedTuple):
    """error: what is raised. message: how it begins. engines: that it is raised by."""

    model: Any
    shape: tuple[int, ...]
    criterion: Any
    draw: Any
    error: type[Exception]
    message: str
    engines: tuple[str, ...] = ("loop", "batched")


def negative(random, shape):
    return labels(random, shape, low=-1)


def too_large(random, shape):
    found = labels(random, shape)
    found[:, 0] = shape[2] + 2
    return found


def too_large_in_a_corner(random, shape):
    found = labels(random, shape)
    found[4, 5, -1, -1] = shape[2]
    return found


def of_another_size(random, shape):
    return torch.zeros(*shape[:2], shape[3] - 1, shape[4], dtype=torch.long)


def token_labels(random, shape):
    return torch.randint(0, shape[3], shape[:3], generator=random)


REFUSALS = {
    "labels beyond the outputs": Refusal(
        flat(3), (4,), F.cross_entropy, too_large, InputError,
        "the model's outputs have shape (6, 3), too narrow for 6 ways: its last layer needs at least 6 outputs",
    ),
    "a label beyond the outputs in a later task": Refusal(
        pixels(3), MAP, F.cross_entropy, too_large_in_a_corner, InputError,
        "the model's outputs have shape (6, 3, 5, 5), too narrow for 4 ways: its last layer needs at least 4 outputs",
    ),
    "255 that is not ignored": Refusal(
        pixels(5), MAP, F.cross_entropy, partial(some_ignored, ignored=255), InputError,
        "the model's outputs have shape (6, 5, 5, 5), too narrow for 256 ways",
    ),
    "labels below 0": Refusal(
        flat(3), (4,), F.cross_entropy, negative, InputError,
        "the support labels hold -1: labels are whole numbers from 0 on, or -100, which is ignored",
    ),
    "-100 where another is ignored": Refusal(
        pixels(5), MAP, nn.CrossEntropyLoss(ignore_index=255), some_ignored, InputError,
        "the support labels hold -100: labels are whole numbers from 0 on, or 255, which is ignored",
    ),
    "all ignored": Refusal(
        flat(3), (4,), F.cross_entropy, all_ignored, InputError,
        "all support labels of a task are -100, which is ignored: a task needs others as well",
    ),
    "no axis of classes": Refusal(
        lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), (4,), F.cross_entropy,
        lambda random, shape: torch.ones(shape, dtype=torch.long), InputError,
        "the model's outputs have shape (6,), without an axis of classes",
    ),
    "numbers without a criterion": Refusal(
        flat(1), (4,), F.cross_entropy, numbers, InputError,
        "the model's outputs have shape (6, 1), a single class, of which the cross-entropy is always 0",
    ),
    "several numbers without a criterion": Refusal(
        flat(3), (4,), F.cross_entropy, numbers, InputError,
        "floating targets of a cross-entropy are probabilities, got -",
    ),
    "whole truths": Refusal(
        flat(3), (4,), lambda o, t: F.binary_cross_entropy_with_logits(o, t), truths, InputError,
        "the criterion does not take targets of torch.int64, but of torch.float64: targets.to(torch.float64)",
    ),
    "truths": Refusal(
        flat(3), (4,), lambda o, t: nn.BCEWithLogitsLoss()(o, t), lambda *a: truths(*a).bool(), InputError,
        "the criterion does not take targets of torch.bool, but of torch.float64",
    ),
    "a map of bytes": Refusal(
        pixels(3), MAP, F.cross_entropy, lambda random, shape: labels(random, shape).byte(), InputError,
        "the criterion does not take targets of torch.uint8, but of torch.int64",
    ),
    "maps of other sizes": Refusal(
        pixels(3), MAP, F.cross_entropy, of_another_size, InputError,
        "a cross-entropy of outputs (6, 3, 5, 5) takes whole numbers (6, 5, 5) as labels, or floating prob",
    ),
    "classes on another axis": Refusal(
        lambda: nn.Linear(4, 9), (3, 4), F.cross_entropy, token_labels, InputError,
        "a cross-entropy of outputs (6, 3, 9) takes whole numbers (6, 9) as labels",
    ),
    "an error of the model": Refusal(
        lambda: Fails(4, 3), (4,), F.cross_entropy, labels, IndexError, "index 9 is out of range in the model",
    ),
    "an error of the model for a regression": Refusal(
        lambda: Fails(4, 3), (4,), F.mse_loss, labels, IndexError, "index 9 is out of range in the model",
    ),
    "an error of the criterion": Refusal(
        flat(3), (4,), fails, labels, RuntimeError, "a criterion of its own error",
    ),
    "an error of the criterion, labels beyond the outputs": Refusal(
        flat(3), (4,), fails, too_large, RuntimeError, "a criterion of its own error",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", ["evaluate", "train", "meta_gradient"])
@pytest.mark.parametrize(
    ("name", "engine"), [(name, e) for name, row in REFUSALS.items() for e in row.engines]
)
def test_errors_name_their_true_cause(name, engine, call):
    row = REFUSALS[name]
    learner, drawn = situation(row)
    learner.model.failing = True
    if name == "all ignored" and call == "meta_gradient":
        assert (
            meta_gradient(learner, drawn.tasks, engine=engine).query_losses[3].isnan()
        )  # as everywhere in torch
        return
    if name == "all ignored" and call == "train":  # where it looks at the first task, at the call
        drawn.tasks = drawn.tasks.map(lambda tensor: tensor[[3] * TASKS])
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    with pytest.raises(row.error) as raised:
        if call == "evaluate":
            evaluate(learner, drawn, tasks=TASKS, at_steps=[STEPS], engine=engine)
        elif call == "meta_gradient":
            meta_gradient(learner, drawn.tasks, engine=engine)
        else:
            list(train(learner, drawn, optimizer, iterations=1, meta_batch_size=TASKS, engine=engine))
    assert type(raised.value) is row.error
    assert str(raised.value).startswith(row.message)


def test_a_single_class_is_refused_by_every_door_of_a_learner():
    learner, drawn = situation(REFUSALS["numbers without a criterion"])
    message = REFUSALS["numbers without a criterion"].message
    task = drawn.tasks.map(lambda tensor: tensor[0])
    for call in (lambda: learner(drawn.tasks), lambda: learner.adapt(task.support)):
        with pytest.raises(InputError) as raised:
            call()
        assert str(raised.value).startswith(message)
