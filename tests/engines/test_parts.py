"""The inner gradient over parts of the support set: the same numbers, or a clear refusal."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomaml import FOMAML, MAML, MLP, InputError, Reptile, meta_gradient
from fomaml.tasks import Examples, Task, stack
from shapes import close, labels, number, same_gradients

STEPS, LR = 2, 0.2


def tasks(support: int, query: int, number_of_them: int = 4) -> list[Task]:
    sizes = enumerate([(support, query)] * number_of_them)
    return [
        Task(*(Examples(number(100 * i + n, n, 4), labels(100 * i + n, 3, n)) for n in size))
        for i, size in sizes
    ]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


CRITERIA = {
    "cross-entropy": F.cross_entropy,
    "module": nn.CrossEntropyLoss(label_smoothing=0.1),
    "class weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5]).double()),
    "ignored": nn.CrossEntropyLoss(ignore_index=2),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "sum of a part": partial(F.cross_entropy, reduction="sum", ignore_index=1),
    "own": lambda outputs, targets: ((outputs - F.one_hot(targets, 3)) ** 2).mean(),
}


@pytest.mark.parametrize("make", [FOMAML, MAML, Reptile])
@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_parts_of_a_support_set_add_up(criterion, engine, make):
    own = stack(tasks(7, 5))
    for size in (1, 3, 7, 9):
        whole = make(model(), LR, STEPS, CRITERIA[criterion])
        parts = make(model(), LR, STEPS, CRITERIA[criterion], inner_accumulate=size)
        found, expected = (meta_gradient(each, own, engine=engine) for each in (parts, whole))
        same_gradients(found.gradients, expected.gradients)
        close(found.support_losses, expected.support_losses)
    one = Examples(own.support.inputs[0], own.support.targets[0])
    for p, q in zip(*(learner.adapt(one).parameters() for learner in (parts, whole))):
        close(p, q)


def test_parts_take_less_memory():
    """The most examples that the model sees at once with gradients."""
    seen = []

    class Watched(MLP):
        def forward(self, inputs):
            seen.append(len(inputs))
            return super().forward(inputs)

    learner = FOMAML(Watched(4, 6, 3).double(), LR, STEPS, inner_accumulate=3)
    learner.adapt(tasks(50, 1)[0].support)
    assert max(seen) <= 8


class Centred(nn.Sequential):
    def forward(self, inputs):
        return super().forward(inputs - inputs.mean(0))


WEIGHTS = torch.tensor([1.0, 5.0, 1.0]).double()
REFUSED = {
    "a model that mixes examples": (
        lambda: FOMAML(Centred(nn.Linear(4, 3)).double(), LR, 1, inner_accumulate=2),
        "the outputs of an example depend on the others",
    ),
    "weights behind a function": (
        lambda: FOMAML(
            model(), LR, 1, lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS), inner_accumulate=2
        ),
        "exact for a criterion that is the mean",
    ),
    "a root": (
        lambda: FOMAML(
            model(), LR, 1, lambda o, t: (o - t[:, None]).square().mean().sqrt(), inner_accumulate=2
        ),
        "exact for a criterion that is the mean",
    ),
    "batch norm": (
        lambda: FOMAML(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double(), LR, 1, inner_accumulate=2),
        "'1' normalises by the statistics of all of it",
    ),
    "a sum": (
        lambda: FOMAML(
            model(), LR, 1, lambda o, t: F.cross_entropy(o, t, reduction="sum"), inner_accumulate=2
        ),
        "exact for a criterion that is the mean",
    ),
    "a contrast": (
        lambda: FOMAML(model(), LR, 1, lambda o, t: (o @ o.T).logsumexp(1).mean(), inner_accumulate=2),
        "exact for a criterion that is the mean",
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_does_not_add_up_is_refused(row):
    make, message = REFUSED[row]
    own = tasks(6, 4)
    for call in (
        lambda: meta_gradient(make(), own),
        lambda: make().adapt(own[0].support),
        lambda: make()(own),
    ):
        with pytest.raises(InputError, match=message):
            call()
