"""The sources of the command line: an entry for each loads its examples and says what suits it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from fomaml.app import grouped
from fomaml.app.grouped import Groups
from fomaml.app.images import load_images
from fomaml.app.settings import Kind, Settings
from fomaml.data.mnist import MNIST, load_mnist
from fomaml.data.omniglot import load_omniglot
from fomaml.data.source import ClassSource
from fomaml.data.synthetic import Sinusoids
from fomaml.errors import InputError
from fomaml.metrics import ACCURACY, LOSS, METRICS, Metric

DIGITS = [str(digit) for digit in range(10)]


class Classes(NamedTuple):
    """The classes to train, to validate and to test on, and the name and origin of the data.

    unvalidated: why there are no validation classes, where that needs words.
    """

    train: ClassSource
    validation: ClassSource | None
    test: ClassSource
    name: str
    origin: str
    unvalidated: str = ""


class Functions(NamedTuple):
    """A family of functions to regress, see `RegressionEpisodes`, and its name and origin."""

    family: Any
    name: str
    origin: str


@dataclass(frozen=True)
class Source:
    """A source of tasks, to be chosen by name.

    load: (settings, allow_download) → its examples.
    kind: of its tasks; where the data tell it, what counts until then.
    decide: (name, path, options given) → the settings that the data decide on, the kind among them; None for a source
        that needs no data for its settings.
    path: what stands after a colon in its name, as in folder:PATH; empty where nothing does.
    options: options that it alone understands, or shares with few, with their defaults.
    defaults: what else it takes for options that are not given, by question ("" where it asks none), then by number of
        shots; the nearest below counts.
    outputs: the outputs of its networks, where they are not the ways.
    inputs: the shape of an input where the data do not say it.
    hidden, context: the hidden layers of its mlp, and the context parameters that CAVIA adds.
    """

    load: Callable[[Settings, bool], Classes | Functions | Groups]
    kind: Kind = "classification"
    decide: Callable[[str, str, Mapping[str, Any]], dict[str, Any]] | None = None
    path: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Mapping[int, Mapping[str, Any]]] = field(default_factory=dict)
    outputs: int | None = None
    inputs: tuple[int, ...] = (1, 28, 28)
    hidden: tuple[int, ...] = (256,)
    context: int = 100

    @property
    def metric(self) -> Metric:
        """What its tasks are scored by."""
        if self.kind == "classification":
            return ACCURACY
        return LOSS if self.decide is None else METRICS["rmse"]

    @property
    def measured(self) -> str:
        """What tables say above the scores: for regression, which loss it is."""
        if self.kind == "classification":
            return f"{ACCURACY.name} in {ACCURACY.unit}"
        return "mean squared error" if self.decide is None else "RMSE in the unit of the targets"


@functools.lru_cache(maxsize=1)
def _mnist(root: Path | None, allow_download: bool) -> MNIST:
    return load_mnist(root, allow_download)


def load_digits(settings: Settings, allow_download: bool) -> Classes:
    mnist = _mnist(settings.data_root, allow_download)
    train, test = mnist.train, mnist.test
    if settings.question == "new-digits":
        train, test = train.select(DIGITS[:5]), test.select(DIGITS[5:])
    return Classes(train, None, test, mnist.name, mnist.origin)


def load_characters(settings: Settings, allow_download: bool) -> Classes:
    assert settings.split is not None and settings.resize is not None  # its own options have defaults
    omniglot = load_omniglot(
        settings.data_root, split=settings.split, resize=settings.resize, allow_download=allow_download
    )
    return Classes(*omniglot[:3], "Omniglot", f"{omniglot.origin}, split {omniglot.split}")


def load_own_images(settings: Settings, allow_download: bool) -> Classes | Groups:
    path = path_of(settings)
    if settings.kind is not None:
        return grouped.load_folder(path, settings)
    folder, unvalidated = load_images(settings, path)
    name = Path(path).resolve().name
    return Classes(folder.train, folder.validation, folder.test, name, folder.origin, unvalidated)


def load_sinusoids(settings: Settings, allow_download: bool) -> Functions:
    return Functions(Sinusoids(), "sinusoids", "y = A sin(x - p), A in [0.1, 5], p in [0, π]")


def load_groups(settings: Settings, allow_download: bool) -> Groups:
    return grouped.load(split_name(settings.source)[0], path_of(settings), settings)


def _grouped(options: Mapping[str, Any], **defaults: Any) -> Source:
    """A source of groups of rows. options: those that say how its file is read."""
    shared: dict[str, Any] = {
        "shares": None,
        "test_keys": None,
        "validation_keys": None,
        "split_seed": None,
        "gap": None,
    }
    shared |= {
        "draw": None,
        "train_draw": None,
        "skip_small_groups": False,
        "fewer_classes": False,
        "scale": True,
        "query_all": False,
    }
    # On chick weights by time (30 training tasks, 2 000 iterations) 0.05 was twice as far off as 0.02 and 0.01.
    usual = {"shots": 5, "inner_lr": 0.02, "inner_steps": 5, "iterations": 2000, "test_tasks": 200}
    return Source(
        load_groups,
        path="FILE",
        decide=grouped.decide,
        options={**options, **shared},
        defaults={"": {1: {**usual, **defaults}}},
        hidden=(64, 64),
        context=10,
    )


# How the defaults of MNIST were found: docs/LOG.md.
SOURCES: dict[str, Source] = {
    "mnist": Source(
        load_digits,
        outputs=10,  # the tutorial's network has ten
        options={"question": "new-labels"},
        defaults={
            "new-labels": {
                1: {"inner_lr": 0.05, "inner_steps": 5, "meta_lr": 5e-3, "iterations": 1000},
                5: {"inner_lr": 0.05, "inner_steps": 5, "meta_lr": 5e-3, "iterations": 800},
            },
            "new-digits": {
                1: {
                    "inner_lr": 0.05,
                    "inner_steps": 5,
                    "meta_batch_size": 32,
                    "iterations": 500,
                    "schedule": "constant",
                    "augment": "rotations",
                },
                5: {"inner_lr": 0.02, "inner_steps": 10, "iterations": 400, "augment": "warps"},
            },
        },
    ),
    "omniglot": Source(
        load_characters,
        options={"split": "maml", "resize": "lanczos"},
        defaults={
            "": {
                1: {
                    "model": "conv4-strided",
                    "inner_lr": 0.4,
                    "inner_steps": 3,
                    "meta_lr": 2e-3,
                    "query_shots": 5,
                    "iterations": 2000,
                    "augment": "rotations",
                },
            }
        },
    ),
    "folder": Source(
        load_own_images,
        path="PATH",
        decide=grouped.decide_folder,
        options={
            "image_size": None,
            "rgb": False,
            "shares": None,
            "skip_small_classes": None,
            "decode": None,
        }
        | dict.fromkeys(("test_keys", "validation_keys", "split_seed"))
        | dict.fromkeys(("skip_small_groups", "fewer_classes", "query_all"), False),
        defaults={
            "": {
                1: {
                    "model": "conv4",
                    "inner_lr": 0.05,
                    "inner_steps": 5,
                    "iterations": 2000,
                    # as its adapted models are asked: one picture at a time
                    "statistics": "support",
                },
            }
        },
    ),
    "sinusoid": Source(
        load_sinusoids,
        kind="regression",
        defaults={
            "": {
                1: {
                    "shots": 10,
                    "inner_lr": 0.01,
                    "inner_steps": 1,
                    "iterations": 15000,
                    "meta_batch_size": 25,
                }
            }
        },
        outputs=1,
        inputs=(1,),
        hidden=(40, 40),
        context=5,
    ),
    "table": _grouped(
        {"task": None, "target": None, "order": None, "features": None, "categorical": None, "kind": None}
        | {"drop_missing": False, "separator": None, "decimal": None}
    ),
    "arrays": _grouped({"task": None, "inputs": None, "target": None, "order": None, "kind": None}),
    "windows": _grouped(
        {
            "task": None,
            "inputs": None,
            "lengths": None,
            "target": None,
            "window": None,
            "hop": None,
            "kind": None,
        }
        | {"skip_short": False},
        model="conv1d",
        inner_lr=0.05,
    ),
}


def split_name(name: str) -> tuple[str, str]:
    """The name of an entry of SOURCES, and what stands after the colon."""
    entry, _, path = name.partition(":")
    return entry, path


def path_of(settings: Settings) -> str:
    """Where the data lie that a source's name leads to: there, or where they have moved since, which --data-root says.

    Raises:
        InputError: those of a run are no longer there.
    """
    path = split_name(settings.source)[1]
    if path and settings.data_root is not None:
        path = str(settings.data_root)
    if path and settings.data is not None and not Path(path).expanduser().exists():
        raise InputError(f"the run's data are no longer at {path}: --data-root PATH says where they are now")
    return path


def source_of(settings: Settings) -> Source:
    """The entry of a run's source, of the kind that its data have."""
    source = SOURCES[split_name(settings.source)[0]]
    return source if settings.kind is None else replace(source, kind=settings.kind)


def names() -> list[str]:
    """The sources as they are typed."""
    return [f"{name}:{source.path}" if source.path else name for name, source in SOURCES.items()]
