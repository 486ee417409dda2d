"""The networks of a run: those by name, and the user's own."""

from __future__ import annotations

import copy
import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fomaml.app import group_networks
from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.device import check_device
from fomaml.app.fits import check_network_fits
from fomaml.app.modules import build, check_forward, check_seeded, offered
from fomaml.app.named import foreign_model, own_model, own_of
from fomaml.app.own import seeded
from fomaml.app.settings import NormPolicy, Settings
from fomaml.app.sources import source_of
from fomaml.backbones import backbone
from fomaml.backbones import head_name as library_head
from fomaml.devices import forked_random
from fomaml.episodes import TaskSequence
from fomaml.errors import InputError
from fomaml.models import MLP, Conv4, Conv4Strided, Conv4StridedFlat, WithContext, convert_batch_norm
from fomaml.tasks import one


def _mlp(settings: Settings, outputs: int) -> nn.Module:
    """An MLP; for CAVIA with context parameters joined to its inputs (Zintgraf et al. 2019, section 4)."""
    source = source_of(settings)
    if settings.facts is not None and settings.facts["categories"] and "drawn" not in settings.facts:
        return group_networks.table_mlp(settings, outputs, source.hidden)
    inputs = math.prod(_image(settings))
    if settings.algorithm != "cavia":
        return MLP(inputs, *source.hidden, outputs)
    context = source.context
    return nn.Sequential(nn.Flatten(), WithContext(MLP(inputs + context, *source.hidden, outputs), context))


def _convolutions(settings: Settings) -> dict:
    """The arguments of the convolutional networks, those of their batch norms included."""
    return {
        "channels": settings.channels[0] if len(settings.channels) == 1 else settings.channels,
        "scale": settings.norm_parameters == "scale-shift",
        "policy": settings.norm_policy,
        "steps": settings.inner_steps if settings.norm_policy == "per-step" else None,
    }


def _image(settings: Settings) -> tuple[int, ...]:
    """The shape of an input."""
    if settings.facts is None:
        shape = settings.image or source_of(settings).inputs
    else:
        shape = settings.facts.get("drawn", settings.facts["shapes"])
        if not isinstance(shape, list):
            raise InputError(
                f"the inputs are {' and '.join(shape)}, but the model {settings.model} takes one: give another --model"
            )
    if settings.model.startswith("conv4") and len(shape) != 3:
        raise InputError(
            f"the model {settings.model} takes images (channels, height, width), but an input has the shape "
            f"{tuple(shape)}: take --model mlp"
        )
    return tuple(shape)


def _outputs(settings: Settings) -> int:
    """How many numbers the network gives for an input."""
    if settings.facts is not None and settings.kind == "regression":
        if settings.facts["outputs"] is None:
            targets = " and ".join(settings.target or ())
            raise InputError(
                f"the targets are {targets}, and the model {settings.model} gives one array: make them the columns of "
                "one, or give a --model and a --loss"
            )
        return settings.facts["outputs"]
    return source_of(settings).outputs or settings.ways


# (settings, outputs) → a network with random weights, by name
NETWORKS: dict[str, Callable[[Settings, int], nn.Module]] = {
    "mlp": _mlp,
    "linear": lambda settings, outputs: nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(_image(settings)), outputs)
    ),
    "conv4": lambda settings, outputs: Conv4(outputs, image=_image(settings), **_convolutions(settings)),
    "conv4-strided": lambda settings, outputs: Conv4Strided(
        outputs, in_channels=_image(settings)[0], **_convolutions(settings)
    ),
    "conv4-strided-flat": lambda settings, outputs: Conv4StridedFlat(
        outputs, image=_image(settings), **_convolutions(settings)
    ),
    "conv1d": group_networks.conv1d,
    "gru": group_networks.gru,
}


def build_model(settings: Settings, seed: int | None = None) -> nn.Module:
    """The run's network with random weights that depend on the seed alone, on the run's device.

    Raises:
        InputError: the device is not there; it is the user's own and has not been named here, or cannot be built.
    """
    seed = settings.seed if seed is None else seed
    if foreign_model(settings):
        return _foreign(settings, seed).to(check_device(settings.device))
    make = functools.partial(NETWORKS[settings.model], settings, _outputs(settings))
    check_network_fits(settings, make)
    with forked_random():
        torch.manual_seed(seed)
        model = make()
    shuffled = source_of(settings).kind == "classification" and not settings.fixed_classes
    if shuffled and ALGORITHMS[settings.algorithm].adapts_head:
        zero_head(model)
    return model.to(check_device(settings.device))


def _foreign(settings: Settings, seed: int) -> nn.Module:
    """A model of the user's own, as its code makes it: no head is set to zero. Its batch norms become this library's,
    which normalise as --norm-policy says: torch's own would move their statistics in no training of this library.
    """
    options, weights = settings.model_options or {}, settings.model_weights
    steps = settings.inner_steps if settings.norm_policy == "per-step" else None
    if not own_model(settings):
        facts = told_to(settings)
        shape = facts.get("input_shape", ())
        model = of_library(
            settings.model, weights or "random", options, facts["outputs"], shape, seed, settings.norm_policy
        )
    else:
        model = build(own_of(settings, "model"), options, told_to(settings), seed, weights)
    return convert_batch_norm(model, settings.norm_policy, steps)


def of_library(
    name: str,
    weights: str,
    options: Mapping[str, Any],
    outputs: int,
    shape: tuple[int, ...],
    seed: int,
    norm: NormPolicy | None = None,
) -> nn.Module:
    """A network of timm or torchvision, see `backbone`; new weights follow from the seed.

    shape: of an input. timm makes a network for other numbers of channels than three.
    """
    channels = {"in_chans": shape[0]} if name.startswith("timm:") and shape and shape[0] != 3 else {}
    try:
        with seeded(seed):
            return backbone(name, outputs, weights=weights, norm=norm, **{**channels, **options})
    except InputError as error:
        message = str(error).replace("weights=FILE", "--model-weights FILE")
        raise InputError(message) from None


def told_to(settings: Settings) -> dict[str, Any]:
    """What a model of the user's own is told of the data, if it asks; see `offered`."""
    facts = settings.facts or {}
    several = settings.facts is not None and not isinstance(facts.get("drawn", facts["shapes"]), list)
    shape = None if several else _image(settings)
    if source_of(settings).kind == "classification":
        return offered(settings.ways, settings.ways, shape)
    return offered(_outputs(settings), None, shape)


def check_model(settings: Settings, model: nn.Module, episodes: TaskSequence) -> None:
    """Raise `InputError` where a model of the user's own cannot be repeated by its seed, or fails on the data.

    episodes: the run's, of which the first one is tried.
    """
    if not foreign_model(settings):
        return
    examples = one(episodes.batch(0, 1), 0).support
    if not own_model(settings):
        check_forward(settings.model, None, copy.deepcopy(model), examples)
        return
    own, again = own_of(settings, "model"), build_model(settings)
    check_seeded(own, model, again)
    check_forward(own.name, own.path, again, examples)


def zero_head(model: nn.Module) -> None:
    """Set the last Linear layer to zero. Labels are shuffled anew in each task, so no label is to be preferred
    before adaptation.
    """
    for parameter in model.get_submodule(head_name(model)).parameters():
        nn.init.zeros_(parameter)


def head_name(model: nn.Module) -> str:
    """The name of the model's last `nn.Linear`."""
    return linear_names(model)[-1]


def linear_names(model: nn.Module) -> list[str]:
    """The names of the model's `nn.Linear` layers in their order."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def head_of(settings: Settings, model: nn.Module) -> str | None:
    """The name of the head: what --head names, or else the last `nn.Linear`; None where there is none.

    Raises:
        InputError: --head names no layer.
    """
    layers = dict(model.named_modules())
    if settings.head is not None:
        if settings.head not in layers and "*" not in settings.head:
            near = difflib.get_close_matches(settings.head, [name for name in layers if name], 4, 0)
            raise InputError(
                f"the model has no layer {settings.head!r} for --head; the nearest: {', '.join(near)}"
            )
        return settings.head
    if foreign_model(settings) and not own_model(settings):
        return library_head(model)
    names = linear_names(model)
    if not names:
        return None
    if foreign_model(settings):
        width, outputs = layers[names[-1]].out_features, told_to(settings)["outputs"]
        if width != outputs:
            raise InputError(
                f"which layer of {settings.model} is the head? Its last nn.Linear, {names[-1]!r}, gives {width} "
                f"outputs, not {outputs}: name it, --head NAME"
            )
    return names[-1]
