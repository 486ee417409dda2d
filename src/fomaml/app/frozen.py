"""Networks that do not learn: what one makes of a run's inputs, over which it runs once."""

from __future__ import annotations

import copy
import logging
from typing import Any, TypeVar

import torch
from torch import nn

from fomaml.app.device import check_device
from fomaml.app.grouped import Groups
from fomaml.app.modules import build, offered
from fomaml.app.named import LIBRARIES, own_of
from fomaml.app.networks import head_of, of_library
from fomaml.app.settings import Settings
from fomaml.app.sources import Classes, source_of
from fomaml.backbones import Decoder, decoder
from fomaml.data.groups import GroupSource
from fomaml.data.source import ClassSource
from fomaml.episodes import Episodes
from fomaml.errors import InputError
from fomaml.features import embed
from fomaml.group_episodes import GroupEpisodes

log = logging.getLogger(__name__)
Source = TypeVar("Source", ClassSource, GroupSource)
Tasks = TypeVar("Tasks", Episodes, GroupEpisodes)


def prepared(settings: Settings, found: Classes | Groups) -> Classes | Groups:
    """The examples of a source as the run's network takes them: images in the colours and the scale that a network of
    timm or torchvision has learned with, and vectors where --features-of makes them.

    Raises:
        InputError: as `embed`, and as the network is built.
    """
    parts: list[Any] = [found.train, found.validation, found.test]
    before = found.train
    decode = library_decoder(settings)
    if decode is not None:
        parts = [part and _decoded(part, decode) for part in parts]
    if settings.features_of is not None:
        network = frozen_network(settings, shape_of(parts[0]))
        number = sum(
            len(part.labels() if isinstance(part, ClassSource) else part.rows) for part in parts if part
        )
        log.info("%s runs over %d inputs, unless their vectors are kept", settings.features_of, number)
        path = settings.features_in
        parts = [part and embed(network, part, layer=settings.features_layer, path=path) for part in parts]
    found = found._replace(train=parts[0], validation=parts[1], test=parts[2])
    if isinstance(found, Groups) and parts[0] is not before:
        found = found._replace(facts={**found.facts, "drawn": list(shape_of(parts[0]))})
    return found


def shape_of(source: ClassSource | GroupSource) -> Any:
    """The shape of an input as it is drawn; None where it is several tensors."""
    first = torch.zeros(1, dtype=torch.int64)
    inputs = source.take(first) if isinstance(source, ClassSource) else source.take(first.numpy())[0]
    return tuple(inputs.shape[1:]) if isinstance(inputs, torch.Tensor) else None


def library_decoder(settings: Settings) -> Decoder | None:
    """How the network of timm or torchvision that sees a run's images has learned to see them; None of any other."""
    name, weights = settings.model, settings.model_weights
    if settings.features_of is not None:
        name, weights = settings.features_of, settings.features_weights
    # timm makes networks for grey images too, which have no weights yet
    if name.partition(":")[0] not in LIBRARIES or (name.startswith("timm:") and weights == "random"):
        return None
    try:
        return decoder(name)
    except InputError:  # without weights of its own, so that nobody knows how it saw them
        return None


def _decoded(source: Source, decode: Decoder) -> Source:
    """Images of bytes as a library's network has learned to see them; anything else as it is."""
    images = (
        source.inputs.dtype == torch.uint8 if isinstance(source, ClassSource) else source.decode is not None
    )
    shape = shape_of(source)
    if not images or shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        return source
    own = copy.copy(source)
    own.decode = decode
    return own


def frozen_network(settings: Settings, shape: tuple[int, ...] | None) -> nn.Module:
    """The network of --features-of. shape: of an input. Its batch norms keep to the statistics of its weights."""
    name, weights = settings.features_of, settings.features_weights
    assert name is not None
    device = check_device(settings.device)
    if name.partition(":")[0] in LIBRARIES:
        assert weights is not None  # see `with_own`
        return of_library(name, weights, {}, 0, shape or (), settings.seed, "frozen").to(device)
    classification = source_of(settings).kind == "classification"
    facts = offered(settings.ways, settings.ways if classification else None, shape)
    return build(own_of(settings, "features_of"), {}, facts, settings.seed, weights).to(device)


def backbone_of(settings: Settings) -> nn.Module | None:
    """The run's network without its head, at the weights that it began with and at their statistics; None of one that
    has none by name.
    """
    if settings.model.partition(":")[0] not in LIBRARIES or settings.model_weights in (None, "random"):
        return None
    assert settings.model_weights is not None
    options, shape = settings.model_options or {}, (settings.image or ())
    if settings.facts is not None:
        shape = settings.facts.get("drawn", settings.facts["shapes"])
    body = of_library(
        settings.model, settings.model_weights, options, 0, tuple(shape), settings.seed, "frozen"
    )
    return body.to(check_device(settings.device))


def body_of(settings: Settings, model: nn.Module) -> nn.Module | None:
    """A network with its head taken off, if that is an nn.Linear."""
    head = head_of(settings, model)
    if head is None or not isinstance(dict(model.named_modules()).get(head), nn.Linear):
        return None
    body = copy.deepcopy(model)
    owner, _, last = head.rpartition(".")
    setattr(body.get_submodule(owner), last, nn.Identity())
    return body


def on_vectors(episodes: Tasks, body: nn.Module) -> Tasks:
    """The same tasks, of what a network makes of each example, which it does once.

    Raises:
        InputError: images that are changed anew in each task; what `embed` refuses.
    """
    if isinstance(episodes, Episodes) and (episodes.turns or episodes.copies > 1):
        raise InputError("--test-augment and --test-copies change an image in each task")
    own = copy.copy(episodes)
    own.source = embed(body, episodes.source)
    return own
