"""What evaluation and training score by, for tasks of many shapes: the figures of a slow loop."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomaml.baselines import fine_tune, nearest_centroid
from fomaml.errors import InputError
from fomaml.evaluate import evaluate
from fomaml.learning.algorithms import FOMAML, ZeroHeadMAML
from fomaml.metrics import Metric, of_each_task
from fomaml.tasks import one
from fomaml.train import train
from targets import (
    LR,
    MAP,
    STEPS,
    TASKS,
    Drawn,
    all_ignored,
    counts,
    flat,
    floating_truths,
    labels,
    numbers,
    pixels,
    probabilities,
    situation,
    some_ignored,
    truths,
)  # fmt: skip

# --- criteria of integer targets, which a user writes --------------------------------------------


def mse_of_counts(outputs, targets):
    return F.mse_loss(outputs, targets.to(outputs.dtype))


def bce_of_truths(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))


def poisson(outputs, targets):
    return F.poisson_nll_loss(outputs, targets)


def over_tokens(outputs, targets):
    """Classes on the last axis, as transformers have them."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


# --- expectations, element by element -------------------------------------------------------------


def share_right(outputs, targets, ignored=None):
    """Of the labels that count, along axis 1 of the outputs."""
    right = [
        np.moveaxis(outputs, 1, -1)[index].argmax() == targets[index]
        for index in np.ndindex(targets.shape)
        if targets[index] != ignored
    ]
    return np.mean(right)


def share_right_of_probabilities(outputs, targets):
    return share_right(outputs, targets.argmax(1))


def mean_squared(outputs, targets):
    return np.mean([(outputs[i] - targets[i]) ** 2 for i in np.ndindex(targets.shape)])


def mean_bce(outputs, targets):
    return np.mean(
        [np.log1p(np.exp(-outputs[i] if targets[i] else outputs[i])) for i in np.ndindex(targets.shape)]
    )


def mean_poisson(outputs, targets):
    return np.mean([np.exp(outputs[i]) - targets[i] * outputs[i] for i in np.ndindex(targets.shape)])


def all_labels_right(outputs, targets):
    """The share of examples all of whose labels are right; of tensors and arrays."""
    return float(
        ((outputs > 0) == (targets > 0))
        .all(1)
        .mean(**({} if isinstance(outputs, np.ndarray) else {"dtype": torch.double}))
    )


def largest_error(outputs, targets):
    return abs(outputs - targets).max()


# --- the table ------------------------------------------------------------------------------------


class Row(NamedTuple):
    """model: of inputs (examples, *shape). expected: of outputs and targets of one task, arrays."""

    model: Any
    shape: tuple[int, ...]
    criterion: Any
    draw: Any
    metric: Any
    expected: Any


class Tokens(nn.Linear):
    """(examples, tokens, 4) → (examples, classes, tokens)."""

    def forward(self, inputs):
        return super().forward(inputs).mT


LEFT_OUT = partial(share_right, ignored=-100)
ROWS = {
    "classes": Row(flat(3), (4,), F.cross_entropy, labels, None, share_right),
    "more outputs than classes": Row(flat(7), (4,), F.cross_entropy, partial(labels, high=3), None, share_right),
    "classes, some ignored": Row(flat(3), (4,), F.cross_entropy, some_ignored, None, LEFT_OUT),
    "classes, weighted": Row(
        flat(3), (4,), nn.CrossEntropyLoss(torch.tensor([1, 2, 3]).double()), labels, None, share_right,
    ),
    "a map": Row(pixels(5), MAP, F.cross_entropy, labels, None, share_right),
    "a map of two classes": Row(pixels(2), MAP, F.cross_entropy, labels, "accuracy", share_right),
    "a map of many classes": Row(pixels(40), (2, 3, 4), F.cross_entropy, labels, None, share_right),
    "a map, some ignored": Row(pixels(5), MAP, F.cross_entropy, some_ignored, None, LEFT_OUT),
    "a map, 255 ignored": Row(
        pixels(5), MAP, nn.CrossEntropyLoss(ignore_index=255), partial(some_ignored, ignored=255), None,
        partial(share_right, ignored=255),
    ),
    "a map, 0 ignored": Row(
        pixels(5), MAP, partial(F.cross_entropy, ignore_index=0), labels, None, partial(share_right, ignored=0),
    ),
    "a volume": Row(lambda: nn.Conv3d(1, 3, 1), (1, 2, 3, 3), F.cross_entropy, labels, None, share_right),
    "tokens": Row(lambda: Tokens(4, 3), (3, 4), F.cross_entropy, some_ignored, None, LEFT_OUT),
    "log-probabilities": Row(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)), (4,), nn.NLLLoss(), some_ignored, None, LEFT_OUT,
    ),
    "smoothed": Row(flat(3), (4,), partial(F.cross_entropy, label_smoothing=0.1), labels, None, share_right),
    "probabilities": Row(flat(3), (4,), F.cross_entropy, probabilities, None, share_right_of_probabilities),
    "maps of probabilities": Row(pixels(5), MAP, F.cross_entropy, probabilities, None, share_right_of_probabilities),
    "numbers": Row(flat(3), (4,), F.mse_loss, numbers, None, mean_squared),
    "one number": Row(flat(1), (4,), nn.MSELoss(), numbers, None, mean_squared),
    "whole numbers": Row(flat(2), (4,), mse_of_counts, counts, None, mean_squared),
    "counts": Row(flat(2), (4,), poisson, counts, None, mean_poisson),
    "counts by a module": Row(flat(1), (4,), nn.PoissonNLLLoss(), counts, "loss", mean_poisson),
    "several labels": Row(flat(3), (4,), F.binary_cross_entropy_with_logits, floating_truths, None, mean_bce),
    "several labels, whole": Row(flat(3), (4,), bce_of_truths, truths, None, mean_bce),
    "whole numbers, by torch's loss": Row(flat(2), (4,), F.mse_loss, counts, None, mean_squared),
    "several labels, whole, by torch's loss": Row(flat(3), (4,), nn.BCEWithLogitsLoss(), truths, None, mean_bce),
    "truths": Row(
        flat(3), (4,), partial(F.binary_cross_entropy_with_logits), lambda *a: truths(*a).bool(), None, mean_bce,
    ),
    "several labels, all right": Row(flat(2), (4,), bce_of_truths, truths, all_labels_right, all_labels_right),
    "a map of truths": Row(pixels(1), MAP, bce_of_truths, truths, None, mean_bce),
    "numbers by a function": Row(flat(3), (4,), F.mse_loss, numbers, largest_error, largest_error),
    "numbers by a metric": Row(
        flat(3), (4,), F.mse_loss, numbers, Metric("error", of_each_task(largest_error), -1, ""), largest_error,
    ),
    "a map by a function": Row(
        pixels(5), MAP, F.cross_entropy, labels, lambda o, t: (o.argmax(1) == t).double().mean(), share_right,
    ),
}  # fmt: skip


def by_hand(learner, tasks, steps, expected):
    found = []
    for task in (one(tasks, index) for index in range(TASKS)):
        with torch.no_grad():
            outputs = learner.adapt(task.support, steps=steps)(task.query.inputs)
        found.append(expected(outputs.numpy(), task.query.targets.numpy()))
    return torch.tensor(np.array(found)).double()


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("name", ROWS)
def test_scores_are_those_of_a_slow_loop(name, engine):
    row = ROWS[name]
    learner, drawn = situation(row)
    found = evaluate(
        learner, drawn, tasks=TASKS, at_steps=(0, STEPS), engine=engine, tasks_at_once=3, metric=row.metric
    )
    expected = {steps: by_hand(learner, drawn.tasks, steps, row.expected) for steps in found}
    for steps, scores in found.items():
        assert scores.shape == (TASKS,) and scores.dtype == torch.float64
        torch.testing.assert_close(scores, expected[steps], rtol=1e-10, atol=1e-10)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.0)
    options = {"iterations": 1, "meta_batch_size": TASKS, "engine": engine, "metric": row.metric}
    [record] = train(learner, drawn, optimizer, **options)
    assert record.before.item() == pytest.approx(expected[0].mean().item(), rel=1e-10)
    assert record.after.item() == pytest.approx(expected[STEPS].mean().item(), rel=1e-10)


@pytest.mark.parametrize("tasks_at_once", [1, 3, 100])
def test_a_function_sees_the_classes_of_a_task_as_if_it_were_alone(tasks_at_once):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    learner, drawn = ZeroHeadMAML(model, LR, STEPS, head="2"), Drawn(nn.Linear(4, 4).double(), (4,), labels)
    ways = [2, 4, 3, 4, 2]
    for part in drawn.tasks:
        part.targets[:] = torch.arange(6) % torch.tensor(ways)[:, None]
    options = {"tasks": TASKS, "at_steps": [STEPS], "tasks_at_once": tasks_at_once}
    found = evaluate(learner, drawn, **options, metric=lambda outputs, targets: outputs.shape[1])
    assert found[STEPS].tolist() == ways
    scores = evaluate(learner, drawn, **options)[STEPS]
    torch.testing.assert_close(scores, by_hand(learner, drawn.tasks, STEPS, share_right), rtol=0, atol=1e-12)


def test_baselines_take_a_metric_in_its_direction():
    row = ROWS["numbers"]
    _, drawn = situation(row)
    model = row.model().double()
    for metric in (
        None,
        Metric("error", of_each_task(largest_error), -1, ""),
        lambda o, t: -largest_error(o, t),
    ):
        found = fine_tune(
            model, drawn, drawn, tasks=5, tuning_tasks=5, inner_lrs=(1e-9, 0.1, 1e9), at_steps=(1, 20),
            criterion=F.mse_loss, metric=metric,
        )  # fmt: skip
        assert (found.inner_lr, found.steps) == (0.1, 20)
        expected = evaluate(FOMAML(model, 0.1, 20, F.mse_loss), drawn, tasks=5, at_steps=[20], metric=metric)
        assert torch.equal(found.scores, expected[20])


def test_the_nearest_centroid_leaves_out_what_is_ignored_and_what_a_task_lacks():
    drawn = Drawn(nn.Linear(4, 4).double(), (4,), labels)
    ways = [2, 4, 3, 4, 2]
    for part in drawn.tasks:
        part.targets[:] = torch.arange(6) % torch.tensor(ways)[:, None]
        part.targets[:, 5] = -100
    expected = []
    for (xs, ys), (xq, yq) in (one(drawn.tasks, index) for index in range(TASKS)):
        centroids = torch.stack([xs[ys == way].mean(0) for way in range(int(ys.max()) + 1)])
        nearest = [int((centroids - x).square().sum(1).argmin()) for x in xq]
        expected.append(np.mean([own == y for own, y in zip(nearest, yq.tolist()) if y >= 0]))
    assert nearest_centroid(drawn, tasks=TASKS, tasks_at_once=3).tolist() == pytest.approx(expected)
    both = nearest_centroid(
        drawn, tasks=TASKS, metric=["accuracy", lambda outputs, targets: outputs.shape[1]]
    )
    assert list(both) == ["accuracy", "<lambda>"] and both["accuracy"].tolist() == pytest.approx(expected)
    found = nearest_centroid(drawn, tasks=TASKS, metric=lambda outputs, targets: outputs.shape[1])
    assert torch.equal(found, both["<lambda>"])
    assert found.tolist() == ways
    for draw, message in (
        (numbers, "the nearest centroid needs one label for each example, got targets of another kind"),
        (all_ignored, "all query labels of a task are -100, which is ignored: a task needs others as well"),
    ):
        with pytest.raises(InputError, match=f"^{message}$"):
            nearest_centroid(Drawn(nn.Linear(4, 4).double(), (4,), draw), tasks=TASKS)
    with pytest.raises(InputError, match=r"^there is no loss here"):
        nearest_centroid(drawn, tasks=1, metric="loss")
