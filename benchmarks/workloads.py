"""The workloads A-G: a network, the sizes of a meta-batch, and the tasks and weights that follow from a seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.models import Conv4, Conv4Strided
from fomaml.tasks import Examples, Task


@dataclass(frozen=True)
class Workload:
    """One first-order meta-gradient over a meta-batch of tasks.

    network: makes the plain `torch.nn` module that users have. own: the same network from this library,
    its parameters in the same order, where it differs. example: the shape of one input. support, query:
    examples a task. ways: None for regression. target: how many times faster than the fastest peer
    this project means to be.
    """

    title: str
    network: Callable[[], nn.Module]
    example: tuple[int, ...]
    tasks: int
    support: int
    query: int
    steps: int
    inner_lr: float
    target: float | None = None
    own: Callable[[], nn.Module] | None = None
    ways: int | None = 5


@dataclass(frozen=True)
class Setup:
    """What a contestant gets: model and tasks of one dtype, the same for all of one seed."""

    workload: Workload
    model: nn.Module
    tasks: Task

    @property
    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.mse_loss if self.workload.ways is None else F.cross_entropy

    def own_model(self) -> nn.Module:
        """This library's network with the same weights."""
        model = self.workload.own().to(next(self.model.parameters()).dtype)
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), self.model.parameters(), strict=True):
                mine.copy_(theirs)
        return model


class MeanOver(nn.Module):
    """The mean over some axes."""

    def __init__(self, *axes: int):
        super().__init__()
        self.axes = axes

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(self.axes)


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv4(channels: int, in_channels: int, features: int) -> nn.Module:
    """Four times [3×3 convolution, batch statistics, ReLU, 2×2 max-pool], linear head."""
    layers: list[nn.Module] = []
    for i in [in_channels, *[channels] * 3]:
        layers += [
            nn.Conv2d(i, channels, 3, padding=1),
            nn.BatchNorm2d(channels, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 5))


def conv4_strided(channels: int = 64) -> nn.Module:
    """Four times [stride-2 3×3 convolution, batch statistics, ReLU], mean over space, linear head."""
    layers: list[nn.Module] = []
    for i in [1, *[channels] * 3]:
        layers += [
            nn.Conv2d(i, channels, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels, track_running_stats=False),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, MeanOver(2, 3), nn.Linear(channels, 5))


def transformer() -> nn.Module:
    layers = [nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True) for _ in range(2)]
    return nn.Sequential(*layers, MeanOver(1), nn.Linear(64, 5))


_MLP = Workload(
    "tutorial MLP 784-256-10, 32 tasks, 5 support, 75 query, 5 steps",
    lambda: mlp(784, 256, 10),
    (784,),
    tasks=32,
    support=5,
    query=75,
    steps=5,
    inner_lr=0.05,
    target=3.0,
)

WORKLOADS = {
    "A": _MLP,
    "B": replace(_MLP, title=_MLP.title.replace("75", "5"), query=5, target=10.0),
    "C": Workload(
        "Conv4-64, 1x28x28 images, 32 tasks, 5 support, 75 query, 5 steps",
        lambda: conv4(64, 1, 64),
        (1, 28, 28),
        tasks=32,
        support=5,
        query=75,
        steps=5,
        inner_lr=0.1,
        target=2.0,
        own=lambda: Conv4(5),
    ),
    "D": Workload(
        "stride-2 Omniglot net, 32 tasks, 5 support, 5 query, 1 step",
        conv4_strided,
        (1, 28, 28),
        tasks=32,
        support=5,
        query=5,
        steps=1,
        inner_lr=0.4,
        target=2.0,
        own=lambda: Conv4Strided(5),
    ),
    "E": Workload(
        "Conv4-32, 3x84x84 images, 4 tasks, 25 support, 75 query, 5 steps",
        lambda: conv4(32, 3, 800),
        (3, 84, 84),
        tasks=4,
        support=25,
        query=75,
        steps=5,
        inner_lr=0.01,
        target=1.7,
        own=lambda: Conv4(5, channels=32, image=(3, 84, 84)),
    ),
    "F": Workload(
        "sinusoid MLP 1-40-40-1, 25 tasks, 10 support, 10 query, 1 step",
        lambda: mlp(1, 40, 40, 1),
        (1,),
        tasks=25,
        support=10,
        query=10,
        steps=1,
        inner_lr=0.01,
        target=1.2,
        ways=None,
    ),
    "G": Workload(
        "two TransformerEncoderLayers (d 64, 4 heads, ff 256), 16 tokens, 32 tasks, 5 support, 15 query, 5 steps",
        transformer,
        (16, 64),
        tasks=32,
        support=5,
        query=15,
        steps=5,
        inner_lr=0.05,
        target=2.0,
    ),
}

# The same networks, small: to try the harness, and for its tests. Not part of any table.
TINY = {
    "tiny-A": replace(_MLP, network=lambda: mlp(12, 8, 5), example=(12,), tasks=3, query=4, steps=2),
    "tiny-C": replace(
        WORKLOADS["C"], network=lambda: conv4(4, 1, 4), tasks=2, query=4, own=lambda: Conv4(5, channels=4)
    ),
    "tiny-D": replace(
        WORKLOADS["D"], network=lambda: conv4_strided(4), tasks=2, own=lambda: Conv4Strided(5, channels=4)
    ),
    "tiny-F": replace(WORKLOADS["F"], tasks=3, steps=2),
    "tiny-G": replace(WORKLOADS["G"], tasks=2, steps=2),
}
TINY = {name: replace(workload, title=name, target=None) for name, workload in TINY.items()}


def find(name: str) -> Workload:
    return (WORKLOADS | TINY)[name]


def build(workload: Workload, dtype: torch.dtype, seed: int, steps: int | None = None) -> Setup:
    """Weights and tasks of a seed; float64 holds the very numbers of float32.

    Weights are the layers' defaults with noise on everything that is a vector, so that no bias is zero
    and no scale one. steps: another number of inner steps.
    """
    workload = workload if steps is None else replace(workload, steps=steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = workload.network()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        tasks = Task(_examples(workload, workload.support), _examples(workload, workload.query))
    return Setup(workload, model.to(dtype), tasks.to(dtype=dtype))


def _examples(workload: Workload, number: int) -> Examples:
    """Classification: noise, the labels 0 … ways - 1 in turn. Regression: sinusoids of the MAML paper."""
    tasks = workload.tasks
    if workload.ways is None:
        inputs = torch.rand(tasks, number, *workload.example) * 10 - 5
        amplitude = torch.linspace(0.1, 5.0, tasks).view(-1, 1, 1)
        phase = torch.linspace(0.0, math.pi, tasks).view(-1, 1, 1)
        return Examples(inputs, amplitude * torch.sin(inputs - phase))
    inputs = torch.randn(tasks, number, *workload.example)
    labels = torch.arange(number) % workload.ways
    return Examples(inputs, labels.expand(tasks, number).clone())
