"""How a run has read its data, as the intake that reads a stranger's the same way."""

from __future__ import annotations

from typing import Any

from fomaml.app.frozen import decoder_of
from fomaml.app.settings import Settings
from fomaml.app.sources import source_of, split_name
from fomaml.data.scaling import Scaling
from fomaml.errors import InputError
from fomaml.serve.intake import ArrayRows, Intake, Pictures, TableRows, WindowRows


def intake_of(settings: Settings) -> Intake:
    """The intake of a run.

    Raises:
        InputError: a source of functions, whose tasks are drawn and have no files.
    """
    source = split_name(settings.source)[0]
    if settings.features_of is not None:
        raise InputError(
            f"the run learns on what {settings.features_of} gives, which does not run here: take "
            "fomaml.features.embed, and load the head by fomaml.app.rundir.load_run"
        )
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
        "scaling": Scaling.from_dict(facts["scaling"]),
    }
    if source == "table":
        separators = {"tab": "\t", "space": " "}
        categories = facts["categories"] or {}
        return TableRows(
            [name for name in facts["inputs"] if name not in categories],
            categories=categories,
            separator=separators.get(settings.separator or "", settings.separator),
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
    shape = settings.image or source_of(settings).inputs
    if settings.facts is not None:
        shape = settings.facts["shapes"]
    channels, height, width = shape
    decode = decoder_of(settings)
    if decode is not None:
        channels = 3 if settings.rgb else 1  # as they are read; the network sees three of them
        filter = {} if settings.resize is None else {"filter": settings.resize}
        seen: dict[str, Any] = {
            "mean": decode.mean,
            "std": decode.std,
            "inverted": source == "omniglot",
            **filter,
        }
        return Pictures(channels, height, width, **seen)
    if source == "omniglot":
        assert settings.resize is not None
        return Pictures(channels, height, width, 0.0, 1.0, inverted=True, filter=settings.resize)
    return Pictures(channels, height, width)
