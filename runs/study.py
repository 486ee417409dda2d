"""What the studies share: intervals over independent units, and a file of results that is kept as they come."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student

from fomaml.app.rundir import circumstances
from fomaml.files import write_text

ROOT = Path(__file__).resolve().parents[1]


class Estimate(NamedTuple):
    """A mean over independent units, and the half-width of its 95 % interval (Student t)."""

    mean: float
    interval: float

    def text(self, digits: int = 1, sign: str = "") -> str:
        return f"{self.mean:{sign}.{digits}f} ± {self.interval:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def estimate(units: torch.Tensor) -> Estimate:
    """Of (units,) independent values. Where one thing has several, as tasks or seeds, take their mean first."""
    units = units.double()
    error = units.std(correction=1).item() / math.sqrt(len(units))
    return Estimate(units.mean().item(), student.ppf(0.975, len(units) - 1) * error)


def verdict(difference: Estimate, direction: int) -> str:
    """Of a learner's difference from a baseline: "wins", "LOSES", or that its interval holds 0."""
    if abs(difference.mean) <= difference.interval:
        return "no difference"
    return "wins" if difference.mean * direction > 0 else "LOSES"


class Parts:
    """The finished parts of a study by name, on disk after each, so that a study that was stopped goes on."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The value, numbers and lists and dicts of them, of a part; computed where it is not there yet."""
        if name not in self.found:
            began = datetime.now()
            self.found[name] = compute()
            write_text(self.path, json.dumps(self.found) + "\n")
            print(f"{datetime.now():%H:%M:%S} {name} ({(datetime.now() - began).seconds} s)", flush=True)
        return self.found[name]


def best(trials: Mapping[str, float], direction: int) -> str:
    """The name of the trial whose mean is best; one that has diverged counts as the worst."""
    return max(
        trials, key=lambda name: direction * trials[name] if math.isfinite(trials[name]) else -math.inf
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def keep(folder: Path, text: str, result: Mapping[str, Any]) -> None:
    """Write result.txt and result.json, which says when, where and with which commit too."""
    write_text(folder / "result.txt", text + "\n")
    write_text(folder / "result.json", json.dumps({**circumstances(), **_rounded(result)}, indent=1) + "\n")
    print(text)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
