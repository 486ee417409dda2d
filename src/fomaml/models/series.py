"""Networks of series: a convolution over time, and a recurrent one. Both take (examples, channels, time)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fomaml.errors import InputError, positive


class ConvNet1d(nn.Module):
    """Strided convolutions over time, each with GroupNorm and ReLU, the mean over time and a linear head.

    Inputs (examples, channels, time) of any length, outputs (examples, outputs). GroupNorm (Wu and He 2018) normalises
    each example by itself, so that none informs another, and its gradients are exact in every engine.

    channels: of the inputs. widths, kernels, strides: of the convolutions, as many each. groups: of each GroupNorm.

    Raises:
        InputError: numbers that do not go together; inputs of another shape.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        widths: Sequence[int] = (64, 64, 64),
        kernels: Sequence[int] = (9, 5, 5),
        strides: Sequence[int] = (4, 2, 2),
        groups: int = 8,
    ):
        super().__init__()
        if not len(widths) == len(kernels) == len(strides) > 0:
            raise InputError(
                f"widths, kernels and strides say it for each convolution, got {len(widths)}, {len(kernels)} and "
                f"{len(strides)} numbers"
            )
        self.channels = before = positive("channels", channels, integer=True)
        layers: list[nn.Module] = []
        for width, kernel, stride in zip(widths, kernels, strides):
            if width % groups:
                raise InputError(
                    f"groups={groups} does not divide a width of {width}; give a divisor of all widths"
                )
            layers += [
                nn.Conv1d(before, width, kernel, stride, kernel // 2),
                nn.GroupNorm(groups, width),
                nn.ReLU(),
            ]
            before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before, outputs)

    def forward(self, series: Tensor) -> Tensor:
        check_series(self, series)
        return self.head(self.body(series).mean(-1))


class GRUNet(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) over time, and a linear head on its last state.

    Inputs (examples, channels, time), outputs (examples, outputs). With x the inputs at a time and h the state before:
        r = σ(W_r x + b_r + U_r h + c_r),  z = σ(W_z x + b_z + U_z h + c_z),
        n = tanh(W_n x + b_n + r ⊙ (U_n h + c_n)),  h′ = (1 - z) ⊙ n + z ⊙ h.
    These are the numbers of `nn.GRU`, whose weights are `into` (W, b) and `again` (U, c). It is written from two linear
    layers because torch's own runs on CUDA in one kernel, which can neither be differentiated twice nor be vmapped.

    channels: of the inputs. hidden: the size of the state.

    Raises:
        InputError: inputs of another shape.
    """

    def __init__(self, channels: int, outputs: int, *, hidden: int = 64):
        super().__init__()
        self.channels = positive("channels", channels, integer=True)
        hidden = positive("hidden", hidden, integer=True)
        self.into, self.again = nn.Linear(channels, 3 * hidden), nn.Linear(hidden, 3 * hidden)
        for parameter in (*self.into.parameters(), *self.again.parameters()):
            nn.init.uniform_(parameter, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))  # as torch's own
        self.head = nn.Linear(hidden, outputs)

    def forward(self, series: Tensor) -> Tensor:
        check_series(self, series)
        state = series.new_zeros(len(series), self.again.in_features)
        for step in self.into(series.mT).unbind(-2):  # (examples, 3 hidden)
            inner = self.again(state)
            (r, z, n), (r_h, z_h, n_h) = step.chunk(3, -1), inner.chunk(3, -1)
            update = torch.sigmoid(z + z_h)
            new = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
            state = new + update * (state - new)
        return self.head(state)


def check_series(model: ConvNet1d | GRUNet, series: Tensor) -> None:
    if series.dim() != 3 or series.shape[1] != model.channels or not series.shape[2]:
        raise InputError(
            f"{type(model).__name__} takes (examples, {model.channels} channels, time), got {tuple(series.shape)}"
        )
