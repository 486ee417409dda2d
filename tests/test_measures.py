"""The named metrics, task by task, against scikit-learn itself."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomaml.errors import InputError
from fomaml.evaluate import estimate
from fomaml.metrics import ACCURACY, METRICS, PSNR, metric_for, metrics_for, named, scores

judge = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")

TASKS, EXAMPLES, WAYS = 4, 12, 3
BCE = F.binary_cross_entropy_with_logits


def score(name, criterion, outputs, targets):
    return scores(metric_for(criterion, name), outputs, targets, None)


def drawn_labels(*extra, ways=WAYS):
    """Outputs (tasks, examples, ways, ...) and labels, each of which occurs in every task."""
    outputs = torch.randn(TASKS, EXAMPLES, ways, *extra, dtype=torch.float64)
    return outputs, torch.rand(TASKS, EXAMPLES, *extra).argsort(1) % ways


# --- of classes: (predictions, probabilities, labels) of a task, flat, to scikit-learn -------------

OF_PREDICTIONS = {
    "accuracy": judge.accuracy_score,
    "balanced-accuracy": judge.balanced_accuracy_score,
    "f1": partial(judge.f1_score, average="macro"),
}


def rows(outputs, labels):
    return outputs.movedim(1, -1).reshape(-1, outputs.shape[1]), labels.flatten()


@pytest.mark.parametrize("extra", [(), (2, 5)], ids=["examples", "pixels"])
@pytest.mark.parametrize("name", OF_PREDICTIONS)
def test_of_predictions(name, extra):
    outputs, labels = drawn_labels(*extra)
    expected = []
    for own, truth in zip(outputs, labels):
        flat, truth = rows(own, truth)
        expected.append(OF_PREDICTIONS[name](truth.numpy(), flat.argmax(1).numpy()))
    assert len({*expected}) > 1
    for kept in (labels, labels.byte()):
        found = score(name, F.cross_entropy, outputs, kept)
        assert found.dtype == torch.float64 and found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("extra", [(), (3,)], ids=["examples", "tokens"])
@pytest.mark.parametrize("ways", [2, 3, 5])
def test_auprc(ways, extra):
    outputs, labels = drawn_labels(*extra, ways=ways)
    expected = []
    for own, truth in zip(outputs, labels):
        flat, truth = rows(own, truth)
        chances = flat.softmax(1).numpy()
        one_hot = np.eye(ways, dtype=int)[truth.numpy()]
        expected.append(
            judge.average_precision_score(truth.numpy(), chances[:, 1])
            if ways == 2
            else judge.average_precision_score(one_hot, chances, average="macro")
        )
    assert score("auprc", F.cross_entropy, outputs, labels).tolist() == pytest.approx(expected, abs=1e-12)


def test_auprc_tells_apart_what_rounds_to_certainty():
    """Softmax of float32 is 1 for all three, and then a tie."""
    outputs = torch.tensor([[[0.0, 40.0, 0.0], [0.0, 50.0, 0.0], [0.0, 60.0, 0.0], [9.0, 0.0, 0.0]]])
    found = score("auprc", F.cross_entropy, outputs, torch.tensor([[0, 1, 1, 0]]))
    # class 1 is ranked 60, 50 before 40; class 0: 9 first, then the least certain of the others
    assert found.tolist() == [1.0]


@pytest.mark.parametrize("name", ["balanced-accuracy", "f1"])
def test_a_class_that_does_not_occur_counts_as_scikit_learn_says(name):
    """Balanced accuracy: the mean over the classes that occur. F1: a class that is predicted alone counts as 0."""
    outputs = F.one_hot(torch.tensor([[0, 1, 2, 1]]), 4).double()
    found = score(name, F.cross_entropy, outputs, torch.tensor([[0, 1, 1, 1]]))
    f1 = (1 + 0.8 + 0) / 3  # class 1: precision 1, recall 2/3
    assert found.tolist() == pytest.approx([(1 + 2 / 3) / 2 if name == "balanced-accuracy" else f1])


def test_auprc_is_the_mean_over_classes_that_occur():
    outputs, labels = drawn_labels(ways=4)
    labels = torch.where(labels == 2, 0, labels)
    expected = [
        np.mean(
            [judge.average_precision_score((t == c).numpy(), o.softmax(1)[:, c].numpy()) for c in (0, 1, 3)]
        )
        for o, t in zip(outputs, labels)
    ]
    assert score("auprc", F.cross_entropy, outputs, labels).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("criterion", [partial(F.cross_entropy, ignore_index=7), nn.NLLLoss(ignore_index=7)])
@pytest.mark.parametrize("name", [*OF_PREDICTIONS, "auprc"])
def test_ignored_labels_are_left_out(name, criterion):
    outputs, labels = drawn_labels()
    labels[:, -3:] = 7
    expected = score(name, F.cross_entropy, outputs[:, :-3], labels[:, :-3])
    assert torch.equal(score(name, criterion, outputs, labels), expected)
    with pytest.raises(InputError, match="all query labels of a task are 7, which is ignored"):
        score(name, criterion, outputs, torch.full_like(labels, 7))


@pytest.mark.parametrize("name", [*OF_PREDICTIONS, "auprc"])
def test_probabilities_for_labels(name):
    outputs, labels = drawn_labels()
    soft = 0.8 * F.one_hot(labels, WAYS).double() + 0.2 / WAYS
    expected = score(name, F.cross_entropy, outputs, labels)
    for criterion in (F.cross_entropy, F.mse_loss):
        assert torch.equal(score(name, criterion, outputs, soft), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 2, 2)], ids=["flat", "column", "a map"])
@pytest.mark.parametrize("name", [*OF_PREDICTIONS, "auprc"])
def test_one_output_of_two_classes(name, shape):
    outputs = torch.randn(TASKS, EXAMPLES, *shape, dtype=torch.float64)
    targets = (torch.rand_like(outputs).argsort(1) % 2).double()
    expected = []
    for own, truth in zip(outputs.flatten(1), targets.flatten(1).long()):
        predictions = (own > 0).numpy()
        by = {n: f(truth.numpy(), predictions) for n, f in OF_PREDICTIONS.items()}
        by["auprc"] = judge.average_precision_score(truth.numpy(), own.numpy())
        expected.append(by[name])
    for criterion in (BCE, nn.BCEWithLogitsLoss(), partial(BCE, reduction="sum")):
        found = score(name, criterion, outputs, targets)
        assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(score(name, F.binary_cross_entropy, outputs.sigmoid(), targets), found)
    if shape == (1,):
        assert torch.equal(score(name, BCE, outputs, targets.squeeze(2).long()), found)


def test_classes_that_a_task_lacks_beside_others():
    """A task of two classes scores as it does alone."""
    outputs, labels = drawn_labels(ways=3)
    two = outputs[:1, :, :2], labels[:1] % 2
    outputs[0, :, 2], labels[0] = -math.inf, two[1]
    for name in ("auprc", "f1", "balanced-accuracy"):
        assert score(name, F.cross_entropy, outputs, labels)[0] == score(name, F.cross_entropy, *two)[0]


# --- of numbers -----------------------------------------------------------------------------------


def columns(numbers):
    return numbers.reshape(len(numbers), -1).numpy()


OF_NUMBERS = {
    "mse": judge.mean_squared_error,
    "rmse": judge.root_mean_squared_error,
    "mae": judge.mean_absolute_error,
    "r2": judge.r2_score,
}


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_of_numbers(name, shape):
    targets = torch.randn(TASKS, EXAMPLES, *shape, dtype=torch.float64)
    outputs = targets + torch.randn_like(targets) * torch.arange(1, TASKS + 1).view(
        -1, *[1] * (targets.dim() - 1)
    )
    expected = [OF_NUMBERS[name](columns(t), columns(o)) for o, t in zip(outputs, targets)]
    assert score(name, F.mse_loss, outputs, targets).tolist() == pytest.approx(expected, rel=1e-12)
    half = score(name, F.mse_loss, outputs.half(), targets.half())
    assert half.dtype == torch.float64 and half.tolist() == pytest.approx(expected, rel=1e-2)


def test_psnr_by_hand():
    targets = torch.zeros(3, 5, 2)
    outputs = targets + torch.tensor([0.1, 1.0, 0.0]).view(3, 1, 1)
    assert score("psnr", F.mse_loss, outputs, targets).tolist() == pytest.approx([20, 0, math.inf], abs=1e-6)
    found = score("psnr:2", F.mse_loss, outputs, targets)
    assert found.tolist() == pytest.approx([20 + 20 * math.log10(2), 20 * math.log10(2), math.inf], abs=1e-6)


@pytest.mark.parametrize("name", ["r2", "mse", "rmse", "mae", "psnr", "f1", "balanced-accuracy", "auprc"])
def test_outputs_that_are_no_numbers_have_no_score(name):
    outputs, labels = drawn_labels()
    outputs[1, 2] = math.nan
    of_numbers = name in ("r2", "mse", "rmse", "mae", "psnr")
    found = score(name, F.cross_entropy, outputs, torch.randn_like(outputs) if of_numbers else labels)
    assert found.isnan().tolist() == [False, True, False, False]


def test_each_has_an_interval_over_tasks():
    outputs, labels = drawn_labels()
    found = score("f1", F.cross_entropy, outputs, labels)
    mean, interval = estimate(found)
    assert mean == pytest.approx(found.mean().item()) and 0 < interval < math.inf


# --- what does not fit ----------------------------------------------------------------------------

OUTPUTS, LABELS = torch.zeros(2, 4, 3), torch.tensor([[0, 1, 2, 0]] * 2)
FLOATS = torch.randn(2, 4, 3)
REFUSED = {
    "a class metric of numbers": ("f1", F.mse_loss, OUTPUTS, FLOATS, "f1 needs labels, or probabilities"),
    "a class metric of single numbers": (
        "balanced-accuracy", BCE, OUTPUTS[..., :1], FLOATS[..., :1],
        "balanced-accuracy of one output for each example needs targets of 0 and 1, got others, as",
    ),
    "a class metric of several labels": (
        "f1", BCE, OUTPUTS, F.one_hot(LABELS, 3), r"f1 needs outputs \(examples, classes, ...\) and labels",
    ),
    "a number metric of labels": (
        "rmse", F.cross_entropy, OUTPUTS, LABELS,
        r"rmse needs floating targets of the outputs' shape, got outputs \(4, 3\) and torch.int64 targets \(4,\)",
    ),
    "targets without the axis of the outputs": (
        "mae", F.mse_loss, OUTPUTS[..., :1], FLOATS[..., 0], r"mae needs floating targets of the outputs' shape",
    ),
    "psnr of labels": ("psnr", F.cross_entropy, OUTPUTS, LABELS, "psnr needs floating targets"),
    "no threshold": (
        "f1", F.soft_margin_loss, OUTPUTS[..., 0], LABELS.clamp(max=1),
        "f1 of one output for each example needs a threshold between the two classes",
    ),
    "r2 of one example": (
        "r2", F.mse_loss, OUTPUTS[:, :1], FLOATS[:, :1],
        "r2 needs query targets that differ within each task, got 2 of 2",
    ),
    "r2 of a constant": (
        "r2", F.mse_loss, OUTPUTS.double(), torch.full((2, 4, 3), 0.1).double(), "r2 needs query targets that differ",
    ),
    "auprc of one class": (
        "auprc", F.cross_entropy, OUTPUTS, LABELS * 0, "auprc needs query examples of two classes or more in each task",
    ),
    "a range of what has none": ("mse:2", F.mse_loss, OUTPUTS, FLOATS, "unknown metric 'mse:2'; there are"),
    "a range that is no number": ("psnr:x", F.mse_loss, OUTPUTS, FLOATS, "the range of psnr is a number, as in psnr:2"),
    "a range of 0": ("psnr:0", F.mse_loss, OUTPUTS, FLOATS, "the range of psnr must be a positive finite number"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "criterion", "outputs", "targets", "message"), REFUSED.values(), ids=REFUSED
)
def test_refused(name, criterion, outputs, targets, message):
    with pytest.raises(InputError, match=f"^{message}"):
        score(name, criterion, outputs, targets)


@pytest.mark.parametrize("name", ["f1", "balanced-accuracy", "auprc", "r2"])
def test_without_scikit_learn_the_extra_is_named_at_once(name, monkeypatch):
    def absent(module, *arguments, **options):
        raise ImportError(module)

    monkeypatch.setattr("fomaml.measures.importlib.import_module", absent)
    with pytest.raises(InputError, match=r"needs scikit-learn: pip install 'fomaml\[metrics\]'"):
        metric_for(F.cross_entropy, name)


# --- names ----------------------------------------------------------------------------------------


def test_names_as_typed():
    for typed in ("balanced-accuracy", "balanced_accuracy", "Balanced-Accuracy"):
        assert named(typed) is METRICS["balanced-accuracy"]
    assert named("psnr") is PSNR and named("psnr:2").name == "psnr:2"
    assert {name: (m.direction, m.unit) for name, m in METRICS.items()} == {
        "accuracy": (1, "%"), "loss": (-1, ""), "balanced-accuracy": (1, "%"), "f1": (1, "%"), "auprc": (1, "%"),
        "mse": (-1, ""), "rmse": (-1, ""), "mae": (-1, ""), "r2": (1, ""), "psnr": (1, "dB"),
    }  # fmt: skip
    assert PSNR.text(21.34, 0.26) == "21.3 ± 0.3"


def test_several_at_once():
    found = metrics_for(F.cross_entropy, ["accuracy", "f1", lambda outputs, targets: 1.0])
    assert [metric.name for metric in found] == ["accuracy", "f1", "<lambda>"]
    assert [m.name for m in metrics_for(F.cross_entropy)] == ["accuracy"]
    assert metrics_for(F.cross_entropy, ACCURACY) == [ACCURACY]
    for asked, message in (
        (["f1", "F1"], "two metrics are named 'f1'"),
        ([], "no metric is asked for"),
        (["f1", 3], "a metric is a name, a Metric or a function"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            metrics_for(F.cross_entropy, asked)
