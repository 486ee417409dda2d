"""A classification problem that a small network learns within seconds: Gaussian clusters."""

import torch

from fomaml.data.source import ClassSource
from fomaml.episodes import Episodes
from fomaml.learning.algorithms import FOMAML
from fomaml.models import MLP


def clusters(classes=8, each=12, width=6, seed=0):
    """Well separated Gaussian clusters: inputs and labels."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=random) * 2
    inputs = centres.repeat_interleave(each, 0) + torch.randn(classes * each, width, generator=random) / 2
    return inputs, torch.arange(classes).repeat_interleave(each)


def episodes(ways=3, seed=0):
    return Episodes(ClassSource(*clusters()), ways=ways, shots=2, query_shots=4, seed=seed)


def learner(preset=FOMAML, **choices):
    torch.manual_seed(5)
    return preset(MLP(6, 16, 3), 0.1, 2, **choices)
