"""A module of nested inputs, a loss of its own, tasks of one's own: checked as any other."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomaml.check import check
from fomaml.errors import InputError
from fomaml.tasks import Examples, Task, stack
from shapes import Deep, Encoder, Pair, labels, number


def tokens(seed: int, n: int) -> Examples:
    return Examples({"input_ids": labels(seed, 11, n, 7)}, labels(seed, 3, n))


def pair(seed: int, n: int) -> Examples:
    kinds = {"kind": labels(seed, 3, n), "value": number(seed, n, 1).float()}
    return Examples((number(seed, n, 3).float(), number(seed + 1, n, 2).float()), kinds)


def deep(seed: int, n: int) -> Examples:
    views = number(seed, n, 2).float(), number(seed + 1, n, 2).float()
    return Examples({"views": views, "context": {"time": number(seed + 2, n, 1).float()}}, labels(seed, 3, n))


def times(seed: int, n: int) -> Examples:
    return Examples(number(seed, n, 1).float(), None)


def both(outputs, targets):
    return F.cross_entropy(outputs[0], targets["kind"]) + F.mse_loss(outputs[1], targets["value"])


def residual(forward, examples):
    slope = torch.func.grad(lambda t: forward(t).sum())(examples.inputs)
    return (slope + forward(examples.inputs)).square().mean()


def solver() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))


class Output(dict):
    """As those of transformers: a mapping whose parts are attributes too."""

    __getattr__ = dict.__getitem__


class Mapped(Encoder):
    def forward(self, input_ids):
        found = super().forward(input_ids)
        return Output(logits=found.logits, hidden_states=found.hidden_states[0])


def of_object(outputs, targets):
    return F.cross_entropy(outputs.logits, targets) + outputs["hidden_states"].square().mean()


def loss_of_object(forward, examples):
    return F.cross_entropy(forward(examples.inputs).logits, examples.targets)


ROWS = {
    "a criterion of the object": (Mapped, tokens, {"criterion": of_object}, "tried as a regression"),
    "a loss of the object": (Mapped, tokens, {"loss": loss_of_object}, "judged by a loss of its own"),
    "a loss of an object that is no mapping": (
        Encoder,
        tokens,
        {"loss": loss_of_object},
        "judged by a loss of its own",
    ),
    "hugging-face": (Encoder, tokens, {"output": "logits"}, "3 outputs for 3 ways"),
    "two heads": (Pair, pair, {"criterion": both}, "outputs (3,), (1,) per example"),
    "deep": (Deep, deep, {"output": "scores"}, "3 outputs for 3 ways"),
    "a loss": (solver, times, {"loss": residual}, "judged by a loss of its own"),
}


@pytest.mark.parametrize("row", ROWS)
def test_it_is_compared_with_the_plain_loop(row):
    make, examples, judged, said = ROWS[row]
    torch.manual_seed(0)
    report = check(
        make(), tasks=[Task(examples(10 * i, 6), examples(10 * i + 5, 4)) for i in range(2)], **judged
    )
    text = str(report)
    assert said in text and "2 tasks of yours, 6 examples" in text
    assert not [finding for finding in report.findings if finding.level == "wrong"], text
    for engine in ("loop", "batched"):
        assert f"first order, {engine}: equals the plain reference" in text
        assert f"second order, {engine}: equals finite differences" in text


class Stale(Encoder):
    """Holds a copy of a parameter, which adaptation does not move."""

    def __init__(self):
        super().__init__()
        self.kept = self.head.weight.detach().clone()

    def forward(self, input_ids):
        found = super().forward(input_ids)
        found.logits = F.linear(found.hidden_states[0], self.kept)
        return found


def test_a_fault_is_found():
    report = check(Stale(), tasks=stack([Task(tokens(0, 6), tokens(5, 4))]), output="logits")
    assert "never read, but the module holds a copy" in str(report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give the shape of one input, or tasks=, and not both"),
        ({"shape": 3, "tasks": [Task(tokens(0, 6), tokens(5, 4))]}, "and not both"),
        ({"tasks": [Task(tokens(0, 6), tokens(5, 4))]}, "must return one floating tensor, not a Answer"),
        (
            {"tasks": [Task(tokens(0, 6), tokens(5, 4))], "output": "score"},
            "output='score': the model returns a",
        ),
        (
            {
                "tasks": [Task(tokens(0, 6), tokens(5, 4))],
                "loss": residual,
                "criterion": F.mse_loss,
                "output": "logits",
            },
            "give one of the two",
        ),
    ],
)
def test_what_it_cannot_try_is_told(arguments, message):
    with pytest.raises(InputError, match=message):
        check(Encoder(), **arguments)
