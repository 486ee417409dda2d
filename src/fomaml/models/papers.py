"""The networks of the papers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fomaml.errors import InputError, positive
from fomaml.models.norms import BatchNorm


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
    """One convolution, its batch norm, ReLU and, without a stride, a 2×2 max-pool; norm: of `BatchNorm`."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: dict):
        pool = [nn.MaxPool2d(2)] if stride == 1 else []
        super().__init__(
            nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1),
            BatchNorm(channels, **norm),
            nn.ReLU(),
            *pool,
        )


def _widths(channels: int | Sequence[int]) -> list[int]:
    """The channels of the four convolutions: one number for all, or one for each."""
    widths = list(channels) if isinstance(channels, Sequence) else [channels] * 4
    if len(widths) != 4:
        raise InputError(f"channels must be one number or four, one for each convolution, got {widths}")
    return [positive("channels", width, integer=True) for width in widths]


class Conv4(nn.Module):
    """Four blocks of [3×3 convolution, batch norm, ReLU, 2×2 max-pool] and a linear head (Vinyals et al. 2016).

    Inputs (examples, channels, height, width), outputs (examples, outputs). With 28×28 images and 64
    channels the head is 64 → outputs; with 84×84 and 32 channels, 800 → outputs. norm: further arguments
    of `BatchNorm`: scale, policy, steps. channels: of all convolutions, or of each of the four.
    """

    def __init__(
        self, outputs: int, *, channels: int | Sequence[int] = 64, image: Sequence[int] = (1, 28, 28), **norm
    ):
        super().__init__()
        in_channels, height, width = image
        if min(height, width) < 16:
            raise InputError(f"Conv4 halves its images four times: {height}x{width} is less than 16x16")
        widths = [in_channels, *_widths(channels)]
        self.body = nn.Sequential(*(_Conv(i, o, 1, norm) for i, o in itertools.pairwise(widths)))
        self.head = nn.Linear(widths[-1] * (height // 16) * (width // 16), outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).flatten(1))


class Conv4Strided(nn.Module):
    """The Omniglot network of Finn et al. 2017, section 5.2: four stride-2 convolutions, mean over space, linear head.

    Inputs (examples, channels, height, width), outputs (examples, outputs). norm: further arguments of
    `BatchNorm`: scale, policy, steps. channels: of all convolutions, or of each of the four.
    """

    def __init__(self, outputs: int, *, channels: int | Sequence[int] = 64, in_channels: int = 1, **norm):
        super().__init__()
        widths = [in_channels, *_widths(channels)]
        self.body = nn.Sequential(*(_Conv(i, o, 2, norm) for i, o in itertools.pairwise(widths)))
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).mean((2, 3)))


class Conv4StridedFlat(nn.Module):
    """The Omniglot network of Reptile's code (Nichol et al. 2018): as `Conv4Strided`, but all of the last map, 2×2
    of 28×28 images, goes to the head. Arguments of `Conv4`.
    """

    def __init__(
        self, outputs: int, *, channels: int | Sequence[int] = 64, image: Sequence[int] = (1, 28, 28), **norm
    ):
        super().__init__()
        in_channels, height, width = image
        widths = [in_channels, *_widths(channels)]
        self.body = nn.Sequential(*(_Conv(i, o, 2, norm) for i, o in itertools.pairwise(widths)))
        self.head = nn.Linear(widths[-1] * -(-height // 16) * -(-width // 16), outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).flatten(1))


class WithContext(nn.Module):
    """A model that also sees context parameters, joined to its inputs (CAVIA, Zintgraf et al. 2019, section 3.2).

    Inputs (examples, features); `model` receives (examples, features + size).
    """

    def __init__(self, model: nn.Module, size: int):
        super().__init__()
        self.model = model
        self.context = nn.Parameter(torch.zeros(size))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(torch.cat([inputs, self.context.expand(len(inputs), -1)], dim=1))
