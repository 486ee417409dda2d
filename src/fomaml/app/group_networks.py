"""The networks of tables and of series, as a run's settings ask for them."""

from __future__ import annotations

from torch import nn

from fomaml.app.settings import Settings
from fomaml.errors import InputError
from fomaml.models import ConvNet1d, GRUNet, TableMLP


def table_mlp(settings: Settings, outputs: int, hidden: tuple[int, ...]) -> nn.Module:
    """An MLP with embeddings of the categories of a table."""
    assert settings.facts is not None
    if settings.algorithm == "cavia":
        raise InputError(f"the algorithm cavia takes one input, got numbers and {_named(settings)}")
    counts = [len(names) for names in settings.facts["categories"].values()]
    return TableMLP(settings.facts["shapes"]["numbers"][0], counts, outputs, hidden=hidden)


def conv1d(settings: Settings, outputs: int) -> nn.Module:
    return ConvNet1d(_channels(settings), outputs)


def gru(settings: Settings, outputs: int) -> nn.Module:
    return GRUNet(_channels(settings), outputs)


def _channels(settings: Settings) -> int:
    """Those of a series (channels, time)."""
    shape = None if settings.facts is None else settings.facts.get("drawn", settings.facts["shapes"])
    if not isinstance(shape, list) or len(shape) != 2:
        got = "images" if shape is None else f"inputs of shape {shape}"
        raise InputError(
            f"the model {settings.model} takes series (channels, time), got {got}: take --model mlp, or windows"
        )
    return shape[0]


def _named(settings: Settings) -> str:
    assert settings.facts is not None
    return f"the categories {', '.join(settings.facts['categories'])}"
