"""Convolutional modules, and how many of their blocks are fused when they are compiled."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fomaml.models import BatchNorm, Conv4, Conv4Strided
from zoo import draw


def block(into, out, *after, kernel=3, norm=nn.BatchNorm2d, **options):
    return [nn.Conv2d(into, out, kernel, **options), norm(out), *after]


def headed(features, *layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 4))


class Residual(nn.Module):
    """The output of the batch norm is used twice."""

    def __init__(self, relu=F.relu):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.again, self.norm_again = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)
        self.relu = relu

    def forward(self, inputs):
        skip = self.norm(self.conv(inputs))
        hidden = self.norm_again(self.again(self.relu(skip)))
        return self.head(self.relu(skip + hidden).mean((2, 3)))


class TwiceUsed(nn.Module):
    """The output of a ReLU goes into a pool and elsewhere."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.head = nn.Linear(10, 4)

    def forward(self, inputs):
        hidden = F.relu(self.norm(self.conv(inputs)))
        return self.head(torch.cat([F.max_pool2d(hidden, 2).mean((2, 3)), hidden.square().mean((2, 3))], 1))


class OtherPool(nn.Module):
    """The pool takes the ReLU of another layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.other = nn.Conv2d(2, 5, 3, padding=1)
        self.head = nn.Linear(10, 4)

    def forward(self, inputs):
        hidden = F.relu(self.norm(self.conv(inputs)))
        other = F.max_pool2d(F.relu(self.other(inputs)), 2)
        return self.head(torch.cat([hidden.mean((2, 3)), other.mean((2, 3))], 1))


class Indices(nn.Module):
    """Where the maxima were matters."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Linear(10, 4)

    def forward(self, inputs):
        hidden = F.relu(self.norm(self.conv(inputs)))
        pooled, where = F.max_pool2d(hidden, 2, return_indices=True)
        return self.head(torch.cat([pooled.mean((2, 3)), where.double().mean((2, 3)) / 9], 1))


class Tied(nn.Module):
    """One weight in two convolutions, and one layer called twice."""

    def __init__(self):
        super().__init__()
        self.into = nn.Conv2d(2, 4, 3, padding=1)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.first.weight
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, inputs):
        hidden = F.relu(self.norm(self.into(inputs)))
        hidden = F.max_pool2d(F.relu(self.norm(self.first(hidden))), 2)
        return self.head(F.relu(self.norm(self.second(hidden))).mean((2, 3)))


class Writes(nn.Module):
    """Writes through a view of an image: the image itself must see it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, inputs):
        hidden = F.relu(self.norm(self.conv(inputs))) * 1.5
        hidden.view(len(hidden), -1).mul_(2).add_(0.1)
        hidden[:, 1].mul_(0.5)
        return self.head(hidden.square().mean((2, 3)))


class Late(Writes):
    """Reads through a view an image that was written after it was taken."""

    def forward(self, inputs):
        hidden = F.relu(self.norm(self.conv(inputs))) * 1.5
        flat = hidden.view(len(hidden), -1)
        hidden.mul_(2).relu_()
        return self.head(flat.square().unflatten(1, (4, -1)).mean(2))


def frozen_conv():
    model = headed(4 * 16, *block(2, 4, nn.ReLU()), *block(4, 4, nn.ReLU(), nn.MaxPool2d(2)))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return model


class Pixels(nn.Module):
    """A convolution with an own view of its weight and of its inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 2, 4) / 4)  # height, width, in, out
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, inputs):
        images = inputs.transpose(2, 3).flip(1)[..., 1:, :]
        hidden = F.conv2d(images, self.weight.permute(3, 2, 0, 1))
        return self.head(F.relu(self.norm(hidden)).permute(0, 2, 3, 1).reshape(len(inputs), -1, 4).mean(1))


RELU, POOL = nn.ReLU(), nn.MaxPool2d(2)
# name → (builder, images' shape, fused blocks per forward pass in a first-order gradient)
CONVOLUTIONS = {
    "conv4": (partial(Conv4, 4, channels=4, image=(2, 17, 19)), (2, 17, 19), 4),
    "conv4-no-scale": (partial(Conv4, 4, channels=4, image=(2, 16, 16), scale=False), (2, 16, 16), 4),
    "conv4-running": (
        partial(Conv4Strided, 4, channels=4, in_channels=2, policy="running"),
        (2, 9, 9),
        4,
    ),
    "group-norm": (
        lambda: headed(4 * 9, *block(2, 4, RELU, POOL, norm=partial(nn.GroupNorm, 2))),
        (2, 8, 8),
        0,
    ),
    "batch-norm": (lambda: headed(4 * 9, *block(2, 4, RELU, POOL)), (2, 8, 8), 1),
    "no-statistics": (
        lambda: headed(36, *block(2, 4, RELU, POOL, norm=partial(nn.BatchNorm2d, track_running_stats=False))),
        (2, 8, 8),
        1,
    ),
    "not-affine": (
        lambda: headed(36, *block(2, 4, RELU, POOL, norm=partial(nn.BatchNorm2d, affine=False))),
        (2, 8, 8),
        1,
    ),
    "own-norm": (lambda: headed(36, *block(2, 4, RELU, POOL, norm=BatchNorm)), (2, 8, 8), 1),
    "in-place": (
        lambda: headed(
            16, *block(2, 4, nn.ReLU(True), POOL), *block(4, 4, nn.ReLU(True), padding=1, stride=2)
        ),
        (2, 8, 8),
        2,
    ),
    "residual": (Residual, (2, 6, 6), 0),
    "no-relu": (lambda: headed(36, *block(2, 4, POOL)), (2, 8, 8), 0),
    "pool-first": (lambda: headed(36, *block(2, 4, POOL, RELU)), (2, 8, 8), 0),
    "relu-first": (lambda: headed(36, nn.Conv2d(2, 4, 3), RELU, nn.BatchNorm2d(4), POOL), (2, 8, 8), 0),
    "leaky": (lambda: headed(36, *block(2, 4, nn.LeakyReLU(), POOL)), (2, 8, 8), 0),
    "pool-3": (lambda: headed(16, *block(2, 4, RELU, nn.MaxPool2d(3))), (2, 8, 8), 1),
    "pool-overlaps": (lambda: headed(4 * 25, *block(2, 4, RELU, nn.MaxPool2d(2, 1))), (2, 8, 8), 1),
    "pool-padded": (lambda: headed(4 * 16, *block(2, 4, RELU, nn.MaxPool2d(2, padding=1))), (2, 8, 8), 1),
    "pool-ceil": (lambda: headed(36, *block(2, 4, RELU, nn.MaxPool2d(2, ceil_mode=True))), (2, 7, 7), 1),
    "pool-dilated": (lambda: headed(16, *block(2, 4, RELU, nn.MaxPool2d(2, 2, dilation=2))), (2, 7, 7), 1),
    "average": (lambda: headed(36, *block(2, 4, RELU, nn.AvgPool2d(2))), (2, 8, 8), 1),
    "two-pools": (lambda: headed(16, *block(2, 4, RELU, POOL, POOL, padding=1)), (2, 8, 8), 1),
    "other-pool": (OtherPool, (2, 8, 8), 1),
    "twice-used": (TwiceUsed, (2, 6, 6), 1),
    "indices": (Indices, (2, 8, 8), 1),
    "dilated": (lambda: headed(36, *block(2, 4, RELU, POOL, dilation=2)), (2, 10, 10), 1),
    "grouped": (lambda: headed(36, *block(2, 4, RELU, POOL, groups=2)), (2, 8, 8), 1),
    "depthwise": (lambda: headed(36, nn.Conv2d(2, 4, 1), *block(4, 4, RELU, POOL, groups=4)), (2, 8, 8), 1),
    "one-by-one": (lambda: headed(64, *block(2, 4, RELU, POOL, kernel=1)), (2, 8, 8), 1),
    "transposed": (
        lambda: headed(36, nn.ConvTranspose2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), RELU, nn.MaxPool2d(3)),
        (2, 4, 4),
        1,
    ),
    "plain": (lambda: headed(36, nn.Conv2d(2, 4, 3), RELU, POOL), (2, 8, 8), 0),
    "wide": (
        lambda: headed(
            32,
            *block(2, 16, RELU, padding=1),
            *block(16, 48, RELU, bias=False),
            *block(48, 32, RELU, stride=2),
        ),
        (2, 6, 5),
        3,
    ),
    "norm-first": (lambda: headed(36, nn.BatchNorm2d(2), RELU, nn.Conv2d(2, 4, 3), POOL), (2, 8, 8), 1),
    "tied": (Tied, (2, 6, 6), 3),
    "frozen": (frozen_conv, (2, 12, 12), 2),
    "writes": (Writes, (2, 6, 6), 0),  # left as they are
    "late": (Late, (2, 6, 6), 0),
    "pixels": (Pixels, (2, 7, 6), 1),
}


def convolutional(name):
    build, shape, blocks = CONVOLUTIONS[name]
    torch.manual_seed(1)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)  # negative ones too
            nn.init.normal_(module.bias)
    return model, draw(shape, F.cross_entropy), blocks
