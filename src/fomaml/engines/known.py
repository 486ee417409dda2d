"""The engines by name."""

from __future__ import annotations

from fomaml.engines import batched, factored, loop
from fomaml.engines.common import Engine

ENGINES: dict[str, Engine] = {
    "loop": loop.problem,
    "batched": batched.problem,
    "factored": factored.problem,
}
AS_ASKED = "as asked"  # why an engine that was asked for by name
