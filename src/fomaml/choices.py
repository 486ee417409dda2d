"""The words that arguments and command-line options share, as types; no torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, Literal, get_args

from fomaml.errors import InputError, shown

# Whose examples batch norms normalise by when a query set is judged: those of the query set itself, of the support
# set, or of the support set and the one query example at hand.
Statistics = Literal["own", "support", "with-query"]
# What a `BatchNorm` normalises by when nothing else is asked for.
Policy = Literal["batch", "support", "running", "per-step", "frozen"]
# What becomes of an outer step whose numbers are not finite.
OnNonfinite = Literal["stop", "skip"]
LearnRates = Literal["elementwise", "per-step"]


def check_choice(what: str, value: Any, choices: Any) -> None:
    """Raise `InputError` unless `value` is one of the words of `choices`, a Literal or a sequence of them."""
    names = get_args(choices) or tuple(choices)
    if value not in names:
        texts = [str(name) for name in names]
        near = difflib.get_close_matches(value, texts, 1) if isinstance(value, str) else []
        hint = f", did you mean {near[0]}? There" if near else "; there"
        raise InputError(f"unknown {what} {shown(value)}{hint} are: {', '.join(texts)}")


def nearest_first(name: Any, names: Sequence[str]) -> str:
    """The names that there are in one line, those first that are most like `name`; of many the nearest alone."""
    ordered = sorted(
        names, key=lambda known: -SequenceMatcher(None, str(name).lower(), known.lower()).ratio()
    )
    return ", ".join(ordered[:20]) + (f" and {len(ordered) - 20} more" if len(ordered) > 20 else "")
