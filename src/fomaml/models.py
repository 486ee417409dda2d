"""The networks of the papers, and a batch norm that is right under vmap and never changes while a task adapts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from fomaml.errors import InputError

# How many examples, from the first on, BatchNorm takes its statistics from; None means all.
_statistics_from: ContextVar[int | None] = ContextVar("statistics_from", default=None)


@contextmanager
def statistics_from(examples: int | None):
    """Within this block every `BatchNorm` takes its batch statistics from the first `examples` only.

    A forward pass over support and query examples joined, with the number of support examples here,
    is the inductive evaluation: query examples do not inform each other.
    """
    token = _statistics_from.set(examples)
    try:
        yield
    finally:
        _statistics_from.reset(token)


class BatchNorm(nn.Module):
    """Batch normalisation by the statistics of the batch at hand, always (Ioffe & Szegedy 2015, eq. 1-4).

    Written from `torch.var_mean`, so it is exact under vmap in first and second order, which
    `nn.BatchNorm2d` is not, and it has no running statistics that adaptation could change.

    Shapes: (examples, channels, ...) in and out, any floating dtype. `scale=False` leaves out γ, as
    the original MAML code does.
    """

    def __init__(self, channels: int, eps: float = 1e-5, scale: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if scale else None
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, inputs: Tensor) -> Tensor:
        axes = [0, *range(2, inputs.dim())]
        first = _statistics_from.get()
        sample = inputs if first is None else inputs[:first]
        variance, mean = torch.var_mean(sample, axes, correction=0, keepdim=True)
        shape = mean.shape
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.view(shape)
        return torch.addcmul(self.bias.view(shape) - mean * scale, inputs, scale)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}, eps={self.eps}, scale={self.weight is not None}"


class MLP(nn.Sequential):
    """A multi-layer perceptron with ReLU between its layers; the tutorial's is `MLP(784, 256, 10)`.

    sizes: the widths from input to output. Inputs (examples, ...) are flattened to
    (examples, sizes[0]); outputs are (examples, sizes[-1]).
    """

    def __init__(self, *sizes: int):
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        super().__init__(*layers[:-1])


class _Conv(nn.Sequential):
    """One convolution, its batch norm, ReLU and, without a stride, a 2×2 max-pool."""

    def __init__(self, channels_in: int, channels: int, stride: int, scale: bool):
        pool = [nn.MaxPool2d(2)] if stride == 1 else []
        super().__init__(
            nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1),
            BatchNorm(channels, scale=scale),
            nn.ReLU(),
            *pool,
        )


class Conv4(nn.Module):
    """Four blocks of [3×3 convolution, batch norm, ReLU, 2×2 max-pool] and a linear head (Vinyals et al. 2016).

    Inputs (examples, channels, height, width), outputs (examples, outputs). With 28×28 images and 64
    channels the head is 64 → outputs; with 84×84 and 32 channels, 800 → outputs.
    """

    def __init__(self, outputs: int, *, channels: int = 64, image: Sequence[int] = (1, 28, 28), scale=True):
        super().__init__()
        in_channels, height, width = image
        if min(height, width) < 16:
            raise InputError(f"Conv4 halves its images four times: {height}×{width} is less than 16×16")
        widths = [in_channels] + [channels] * 4
        self.body = nn.Sequential(*(_Conv(i, o, 1, scale) for i, o in itertools.pairwise(widths)))
        self.head = nn.Linear(channels * (height // 16) * (width // 16), outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).flatten(1))


class Conv4Strided(nn.Module):
    """The Omniglot network of Finn et al. 2017, section 5.2: four stride-2 convolutions, mean over space, linear head.

    Inputs (examples, channels, height, width), outputs (examples, outputs).
    """

    def __init__(self, outputs: int, *, channels: int = 64, in_channels: int = 1, scale=True):
        super().__init__()
        widths = [in_channels] + [channels] * 4
        self.body = nn.Sequential(*(_Conv(i, o, 2, scale) for i, o in itertools.pairwise(widths)))
        self.head = nn.Linear(channels, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).mean((2, 3)))


def convert_batch_norm(model: nn.Module) -> nn.Module:
    """Replace, in place, every `nn.BatchNorm1d/2d/3d` by this module's `BatchNorm`, weights kept.

    Returns the model (or the replacement, when the model itself is a batch norm). Running statistics
    are dropped: the replacement normalises by the batch at hand.
    """
    if isinstance(model, nn.modules.batchnorm._BatchNorm):
        new = BatchNorm(model.num_features, model.eps, scale=model.affine)
        if model.affine:
            new.weight, new.bias = model.weight, model.bias
        else:
            new.bias.requires_grad_(False)
        return new.train(model.training)
    for name, child in model.named_children():
        setattr(model, name, convert_batch_norm(child))
    return model
