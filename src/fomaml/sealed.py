"""JSON objects with a digest of what they hold, which tells whether they are still what was written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

DIGEST = "digest"  # the name of the last entry


def sealed(values: Mapping[str, Any]) -> str:
    """The values as an indented JSON object with a digest of the rest as its last entry; what is not finite is null."""
    own = json.loads(json.dumps(finite(values), default=str))
    own[DIGEST] = settings_digest(own)
    text = json.dumps(own, indent=2, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # names of files that are no text
        return json.dumps(own, indent=2) + "\n"
    return text


def unsealed(text: str, required: bool = False) -> dict[str, Any]:
    """Read `sealed` back, or a JSON object of earlier versions, without a digest, unless one is required.

    Raises:
        ValueError: no JSON object, or not the one that was written.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, got a {type(values).__name__}")
    digest = values.pop(DIGEST, None)
    if digest is None and required:
        raise ValueError("it has no digest, which it was written with")
    if digest is not None and digest != settings_digest(values):
        raise ValueError("it holds something else than what was written")
    return values


def finite(values: Any) -> Any:
    """JSON-able values with None in place of numbers that are not finite, which JSON has not."""
    if isinstance(values, Mapping):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def settings_digest(settings: Mapping[str, Any]) -> str:
    """The SHA-256 digest of JSON-able settings, whatever the order of their names."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()
