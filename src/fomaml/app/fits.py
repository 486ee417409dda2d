"""Whether a run fits into memory at all, told from its settings alone. The estimates are lower bounds: what passes may
still be too large, and what is refused never ran.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from fomaml.app.settings import Settings
from fomaml.app.sources import source_of
from fomaml.errors import InputError
from fomaml.memory import check_fits

NUMBER = 4  # bytes of a float32
DRAWN = 16  # bytes of the random numbers that an example is drawn with, and of its target


def check_training_fits(settings: Settings) -> None:
    """Raise `InputError` where the tasks of an outer step, which are drawn together, cannot be held."""
    ways = 1 if source_of(settings).kind == "regression" else settings.train_ways
    examples = ways * (settings.train_shots + settings.query_shots)
    task = examples * _example(settings)
    check_fits(f"a training task of {examples} examples", task, _cure(settings))
    number = settings.meta_batch_size
    check_fits(f"a meta-batch of {number} tasks", number * task, "give a smaller --meta-batch-size")
    check_tasks_fit(settings)


def check_tasks_fit(settings: Settings) -> None:
    """Raise `InputError` where one task of the test, or the scores of all, cannot be held."""
    ways = 1 if source_of(settings).kind == "regression" else settings.ways
    queries = 0 if settings.query_all else settings.test_query_shots
    examples = ways * settings.test_copies * (settings.shots + queries)
    copies = ", or fewer --test-copies" if settings.test_copies > 1 else ""
    check_fits(f"a test task of {examples} examples", examples * _example(settings), _cure(settings) + copies)
    for name in ("test_tasks", "validation_tasks"):
        number = getattr(settings, name)
        scores = number * len(settings.test_steps) * NUMBER
        check_fits(f"the scores of {number} tasks", scores, f"give fewer --{name.replace('_', '-')}")


def check_image_fits(size: tuple[int, int] | None, rgb: bool) -> None:
    """Raise `InputError` where one image of this size cannot be held."""
    if size is not None:
        bytes_of_it = math.prod(size) * (3 if rgb else 1)
        check_fits(f"an image of {size[0]} x {size[1]}", bytes_of_it, "give a smaller --image-size")


def check_network_fits(settings: Settings, make: Callable[[], nn.Module]) -> None:
    """Raise `InputError` where a network's weights cannot be held. make: is called on the device
    meta, where nothing is allocated.
    """
    cure = f"give a smaller network than --model {settings.model}" + (
        " with these --channels" if settings.model.startswith("conv4") else ""
    )
    try:
        with torch.device("meta"):
            model = make()
    except (OverflowError, RuntimeError) as error:  # the shape of a tensor whose bytes no int64 counts
        if not _is_of_size(error):
            raise
        raise InputError(
            f"the network {settings.model} has more weights than can be counted: {cure}"
        ) from None
    weights = list(model.parameters())
    number = sum(each.numel() for each in (*weights, *model.buffers()))
    check_fits(
        f"the network {settings.model} of {number} weights", NUMBER * number, cure,
        settings.device,
    )  # fmt: skip
    if settings.algorithm == "maml" and settings.compile != "yes":
        # differentiated through, every step keeps the weights that it has made; batch norms may stay as they are
        moved = sum(weight.numel() for weight in weights if weight.dim() > 1)
        check_fits(
            f"{settings.inner_steps} inner steps of second order", settings.inner_steps * NUMBER * moved,
            "give fewer --inner-steps, or --algorithm fomaml", settings.device,
        )  # fmt: skip


def _is_of_size(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, OverflowError) or "overflow" in text or "too large" in text


def _cure(settings: Settings) -> str:
    """What makes tasks smaller."""
    ways = "" if source_of(settings).kind == "regression" else "--ways, "
    return f"give fewer {ways}--shots or --query-shots" + (
        ", or a smaller --image-size" if settings.image_size else ""
    )


def _example(settings: Settings) -> int:
    """The bytes of one example at least: of images one for each number, which they may be kept in."""
    if settings.image_size is not None:
        return DRAWN + math.prod(settings.image_size) * (3 if settings.rgb else 1)
    if settings.image is not None:
        return DRAWN + math.prod(settings.image)
    return DRAWN
