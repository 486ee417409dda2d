"""Further training classes made of the ones there are: whole classes turned, or warped into pseudo-characters."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fomaml.data.source import ClassSource
from fomaml.data.stored import changed, in_a_row, some
from fomaml.errors import positive, whole


def rotated(source: ClassSource) -> ClassSource:
    """Four times the classes: each turned as a whole by 0, 90, 180 and 270 degrees (Santoro et al. 2016)."""
    turns = [(f"rot{90 * k}", partial(torch.rot90, k=k, dims=(-2, -1))) for k in (1, 2, 3)]
    return source.joined(turns)


def turned(inputs: Tensor, quarters: Tensor) -> Tensor:
    """Each class of each task turned as a whole, by as many times 90 degrees as `quarters` says.

    inputs: (tasks, ways, examples, channels, side, side). quarters: (tasks, ways), 0 … 3.
    """
    side = inputs.shape[-1]
    places = torch.arange(side * side, device=inputs.device).view(side, side)
    turns = torch.stack(
        [places.rot90(k).flatten() for k in range(4)]
    )  # of each turn, where a pixel comes from
    own = turns[quarters.to(inputs.device)][:, :, None, None]
    pixels = inputs.flatten(-2)
    return pixels.gather(-1, own.expand(pixels.shape)).view(inputs.shape)


def jittered(inputs: Tensor, randoms: Tensor, strength: float) -> Tensor:
    """Each image under a small random affine map of its own, with zeros around it.

    inputs: (..., channels, height, width). randoms: (..., 6) in [0, 1). In coordinates from -1 to 1 the map is
    x → (I + s·U)x + s·u/2 with s the strength, the entries of U and u uniform in [-1, 1]: with 0.1 up to some 6
    degrees, 10 % of stretch or shear, and a twentieth of half the image of shift.
    """
    changes = strength * (2 * randoms.to(inputs) - 1).view(-1, 2, 3)
    changes = torch.cat([changes[..., :2], 0.5 * changes[..., 2:]], dim=-1)
    maps = changes + torch.eye(2, 3, dtype=changes.dtype, device=changes.device)
    images = inputs.flatten(0, -4)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).view(inputs.shape)


def warped(source: ClassSource, classes: int, *, examples: int = 200, seed: int = 0) -> ClassSource:
    """The rotated classes, filled up to `classes` with pseudo-characters.

    A pseudo-character is one class under a warp of its own, the same for all its examples: a random
    rotation, reflection, shear and stretch, and a smooth random displacement of the pixels. So a few
    classes give as many different ones as meta-training asks for.

    source: images (examples, channels, height, width); whole numbers stay whole. examples: the images of a
    pseudo-character, drawn from its class. Depends on the seed alone.
    """
    classes, examples = whole("classes", classes), positive("examples", examples, integer=True)
    random = torch.Generator().manual_seed(whole("seed", seed))
    base = rotated(source)
    parts = [(base.inputs, base.labels(), base.names)]
    for number in range(len(base), classes):
        origin = int(torch.randint(len(source), (), generator=random))
        rows = torch.randint(int(source.counts[origin]), (examples,), generator=random)
        images = some(source.inputs, rows + source.offsets[origin])
        warp = partial(_moved, grid=_warp(images.shape[-2:], random))
        label = torch.full((examples,), number)
        parts.append((changed(images, warp), label, [f"{source.names[origin]} warp{number}"]))
    inputs, labels, names = zip(*parts)
    return ClassSource(in_a_row(inputs), torch.cat(labels), [n for own in names for n in own], source.decode)


def _moved(images: Tensor, grid: Tensor) -> Tensor:
    """All images sampled at one grid, in their own dtype."""
    numbers = images if images.dtype == torch.float64 else images.float()
    grids = grid.to(numbers).expand(len(images), -1, -1, -1)
    found = F.grid_sample(numbers, grids, align_corners=False)
    return (found if images.is_floating_point() else found.round()).to(images.dtype)


def _warp(size: torch.Size, random: torch.Generator) -> Tensor:
    """A sampling grid (1, height, width, 2) in [-1, 1]: an affine map after a smooth displacement."""

    def uniform(bound: float) -> float:
        return (2 * torch.rand((), generator=random).item() - 1) * bound

    angle, flip = uniform(math.pi), 1 if uniform(1) > 0 else -1
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    stretch = torch.tensor([[math.exp(uniform(0.2)), uniform(0.4)], [uniform(0.4), math.exp(uniform(0.2))]])
    linear = turn @ stretch @ torch.diag(torch.tensor([float(flip), 1.0]))
    displacement = 0.3 * torch.randn(1, 2, 4, 4, generator=random)
    displacement = F.interpolate(displacement, size=size, mode="bicubic", align_corners=True)
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, 1, *size], align_corners=False)
    return (grid + displacement.permute(0, 2, 3, 1)) @ linear.T
