"""How a run has read its data, as the intake that reads a stranger's the same way."""

from __future__ import annotations

from typing import Any

from fomaml.app.frozen import frozen_network, library_decoder
from fomaml.app.group_tasks import scaling_of
from fomaml.app.grouped import separator_of
from fomaml.app.settings import Settings
from fomaml.app.sources import split_name
from fomaml.errors import InputError
from fomaml.serve.intake import Intake
from fomaml.serve.pictures import Embedded, Pictures
from fomaml.serve.rows import ArrayRows, TableRows, WindowRows


def intake_of(settings: Settings) -> Intake:
    """The intake of a run.

    Raises:
        InputError: a source of functions, whose tasks are drawn and have no files; a frozen network that cannot be
            built here.
    """
    intake = _read_by(settings)
    if settings.features_of is None:
        return intake
    shape = (intake.channels, intake.height, intake.width) if isinstance(intake, Pictures) else None
    return Embedded(intake, frozen_network(settings, shape), settings.features_layer)


def _read_by(settings: Settings) -> Intake:
    source = split_name(settings.source)[0]
    if source == "sinusoid":
        raise InputError(
            "the tasks of the source sinusoid are drawn, not read: there are no inputs of one's own"
        )
    if source in ("mnist", "omniglot", "folder"):
        return _pictures(settings, source)
    facts = settings.facts
    assert facts is not None and settings.target is not None and settings.kind is not None
    shared: dict[str, Any] = {
        "targets": list(settings.target),
        "kind": settings.kind,
        "task": settings.task,
        "scaling": scaling_of(settings),
    }
    if source == "table":
        categories = facts["categories"] or {}
        return TableRows(
            [name for name in facts["inputs"] if name not in categories],
            categories=categories,
            separator=separator_of(settings.separator),
            decimal=settings.decimal or ".",
            drop_missing=settings.drop_missing,
            **shared,
        )
    assert settings.inputs is not None
    if source == "arrays":
        return ArrayRows(list(settings.inputs), **shared)
    assert settings.lengths is not None and settings.window is not None and settings.hop is not None
    return WindowRows(
        settings.inputs[0],
        settings.lengths,
        settings.window,
        settings.hop,
        skip_short=settings.skip_short,
        **shared,
    )


def _pictures(settings: Settings, source: str) -> Pictures:
    decode = library_decoder(settings)
    if source == "omniglot":
        assert settings.resize is not None
        return Pictures(1, 28, 28, 0.0, 1.0, inverted=True, filter=settings.resize, decode=decode)
    if source == "mnist":
        return Pictures(1, 28, 28, decode=decode)
    return Pictures(3 if settings.rgb else 1, *_size(settings), decode=decode)


def _size(settings: Settings) -> tuple[int, int]:
    """The height and width of the images of a folder."""
    if settings.image_size is not None:
        return settings.image_size
    shape = settings.image if settings.facts is None else settings.facts["shapes"]
    if shape is None or len(shape) != 3:
        raise InputError(
            "the run has kept no size of its pictures, only what a frozen network makes of them: train with "
            "--image-size HEIGHT WIDTH"
        )
    return shape[1], shape[2]
