"""The modules that several test files try, and random tasks for them."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fomaml.models import MLP, Conv4, Conv4Strided, WithContext
from fomaml.tasks import Examples, Task


class User(nn.Module):
    """Tied weights, an unused and a frozen parameter, and a buffer that counts and matters."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(6, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.head = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.calls += 1
        hidden = F.relu(self.into(inputs)) * (1 + self.calls / 10)
        return self.head(self.second(self.first(hidden).tanh() * self.frozen).tanh())


class Twins(nn.Module):
    """Two parameters added together: autograd may hand both the same gradient tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.into, self.head = nn.Linear(6, 8, bias=False), nn.Linear(8, 4)

    def forward(self, inputs):
        return self.head((self.into(inputs) + (self.a + self.b)).tanh())


class Drift(nn.Module):
    """A buffer that changes what goes into the first layer."""

    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, inputs):
        self.mean.mul_(0.5).add_(inputs.detach().mean(0), alpha=0.5)
        return self.head(self.into(inputs - self.mean).tanh())


class Autoencoder(nn.Module):
    """A Linear whose weight is used a second time, transposed, outside of the layer."""

    def __init__(self):
        super().__init__()
        self.encode, self.head = nn.Linear(6, 8), nn.Linear(6, 4)

    def forward(self, inputs):
        return self.head(self.encode(inputs).tanh() @ self.encode.weight)


class Twice(nn.Module):
    """The same Linear on the inputs and again on its own outputs."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, inputs):
        return self.head(self.body(self.body(inputs).tanh()).tanh())


class Gated(nn.Module):
    """A Linear that takes one vector, the mean of all examples, and no batch."""

    def __init__(self):
        super().__init__()
        self.gate, self.into, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, inputs):
        return self.head(self.into(inputs).tanh() * self.gate(inputs.mean(0)).sigmoid())


class Attention(nn.Module):
    """One head of attention over three tokens of width four, written from Linear layers."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 4)

    def forward(self, inputs):
        tokens = inputs.unflatten(-1, (3, 4))  # (examples, tokens, width)
        weights = (self.query(tokens) @ self.key(tokens).mT / 2).softmax(-1)
        return self.head((tokens + weights @ self.value(tokens)).mean(-2))


class Padded(nn.Module):
    """An embedding whose padding never learns: torch's vmap knows that of the first task alone."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(3, 5, padding_idx=1), nn.Linear(5, 4)

    def forward(self, inputs):
        return self.head(self.table((inputs * 2).clamp(-1, 1).round().long() + 1).mean(-2).tanh())


def conv_group_norm():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)
    )


def conv_batch_norm():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)
    )


def mlp_layer_norm():
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)
    )


def no_bias():
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))


def regression():
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


# name → (builder, shape of one input, criterion)
MODULES = {
    "mlp": (partial(MLP, 36, 12, 4), (1, 6, 6), F.cross_entropy),
    "conv4": (partial(Conv4, 4, channels=8, image=(1, 16, 16)), (1, 16, 16), F.cross_entropy),
    "conv4-strided": (partial(Conv4Strided, 4, channels=6), (1, 12, 12), F.cross_entropy),
    "group-norm": (conv_group_norm, (1, 8, 8), F.cross_entropy),
    "layer-norm": (mlp_layer_norm, (6,), F.cross_entropy),
    "batch-norm": (conv_batch_norm, (1, 8, 8), F.cross_entropy),
    "user": (User, (6,), F.cross_entropy),
    "twins": (Twins, (6,), F.cross_entropy),
    "drift": (Drift, (6,), F.cross_entropy),
    "autoencoder": (Autoencoder, (6,), F.cross_entropy),
    "gated": (Gated, (6,), F.cross_entropy),
    "attention": (Attention, (12,), F.cross_entropy),
    "padded": (Padded, (6,), F.cross_entropy),
    "no-bias": (no_bias, (6,), F.cross_entropy),
    "twice": (Twice, (6,), F.cross_entropy),
    "regression": (regression, (1,), F.mse_loss),
    "context": (lambda: WithContext(MLP(6 + 3, 12, 4), 3), (6,), F.cross_entropy),
}


def draw(shape, criterion, tasks=3, ways=4, shots=2, query_shots=3):
    """Random float64 tasks of this input shape; random targets, so that no loss gets near 0."""

    def examples(number):
        inputs = torch.randn(tasks, number, *shape, dtype=torch.float64)
        if criterion is F.mse_loss:
            return Examples(inputs, torch.randn(tasks, number, 1, dtype=torch.float64))
        order = torch.rand(tasks, number).argsort(1)  # every class is there, in an order that means nothing
        return Examples(inputs, order % ways)

    return Task(examples(ways * shots), examples(ways * query_shots))


def example(name, **sizes):
    """The module, some tasks for it and its criterion."""
    build, shape, criterion = MODULES[name]
    torch.manual_seed(1)
    return build().double(), draw(shape, criterion, **sizes), criterion
