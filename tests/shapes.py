"""Tasks of any shape, and the obvious slow loop over them: `functional_call` and `torch.autograd.grad`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fomaml.tasks import Examples, Task


def number(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed: int, ways: int, *shape: int) -> Tensor:
    return torch.randint(ways, shape, generator=torch.Generator().manual_seed(seed))


class Slow(NamedTuple):
    """gradients by name, of the weighted mean; losses and outputs by task."""

    gradients: dict[str, Tensor]
    losses: Tensor
    outputs: list


def slow(
    model: nn.Module,
    tasks: list[Task],
    loss: Callable[[Callable, Examples], Tensor],
    lr: float,
    steps: int,
    first_order: bool = True,
    weights: list[float] | None = None,
    outputs: Callable[[Callable, Examples], object] | None = None,
) -> Slow:
    """The meta-gradient of tasks one by one, by the definition."""
    own = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    weights = weights or [1.0] * len(tasks)
    total, losses, found = 0.0, [], []
    for task, weight in zip(tasks, weights):
        point = dict(own)

        def forward(*args, point, **kwargs):
            return functional_call(model, point, args, kwargs)

        for _ in range(steps):
            value = loss(lambda *a, point=point, **k: forward(*a, point=point, **k), task.support)
            slopes = torch.autograd.grad(
                value, [*point.values()], create_graph=not first_order, allow_unused=True
            )
            if first_order:
                slopes = [None if g is None else g.detach() for g in slopes]
            point = {n: p if g is None else p - lr * g for (n, p), g in zip(point.items(), slopes)}
        last = lambda *a, point=point, **k: forward(*a, point=point, **k)  # noqa: E731
        value = loss(last, task.query)
        losses.append(value.detach())
        found.append(outputs(last, task.query) if outputs else None)
        total = total + weight * value
    gradients = torch.autograd.grad(total / sum(weights), [*own.values()], allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(own.values(), gradients)]
    return Slow(dict(zip(own, zeros)), torch.stack(losses), found)


def close(found, expected, of=lambda value: value) -> None:
    torch.testing.assert_close(of(found), of(expected), rtol=1e-9, atol=1e-11)


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- models of nested inputs ----------------------------------------------------------------------


class Answer:
    """What models of Hugging Face's style return."""

    def __init__(self, logits: Tensor, hidden: Tensor):
        self.loss, self.logits, self.hidden_states = None, logits, (hidden,)


class Encoder(nn.Module):
    """Token ids and a mask, by keyword, to an object with `logits`."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.unsqueeze(-1).to(self.head.weight.dtype)
        mean = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1).clamp(min=1)
        hidden = torch.tanh(self.body(mean))
        return Answer(self.head(hidden), hidden)


class Pair(nn.Module):
    """Two positional inputs to a tuple of a class and a value."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.kind, self.value = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, left, right):
        hidden = torch.tanh(self.left(left) + self.right(right))
        return self.kind(hidden), self.value(hidden)


class Deep(nn.Module):
    """A dict that holds a tuple and a dict, to a dict."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(5, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, views, context):
        hidden = torch.tanh(self.mix(torch.cat([*views, context["time"]], 1)))
        return {"scores": self.out(hidden), "size": hidden.square().sum(1)}
