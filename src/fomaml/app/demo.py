"""What the page of `fomaml demo` can ask for: adapt a run to pictures, say what it makes of another, keep the model."""

from __future__ import annotations

import base64
import binascii
import itertools
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.calibrate import nearest
from fomaml.app.serve_commands import told
from fomaml.app.serving import AdaptedModel, Run, save_model
from fomaml.app.sources import split_name
from fomaml.data.images import TooManyPixels, opened_image
from fomaml.errors import InputError, shown
from fomaml.serve.pictures import Embedded, Pictures

CLASSES = 10  # at most, where the run's head does not allow fewer
BODY = 64 * 2**20  # bytes of a request
PICTURES = 200  # of one request
PIXELS = 50_000_000  # of one picture, as its header declares them
LETTERS = 60  # of a name
HELD = 2  # adapted models: two pages may be open
PARAMETERS = 200_000_000  # of all models of one curve
AT = (0, 1, 2, 3, 5, 10, 20, 50, 100)  # the steps of a curve


class Drawn(NamedTuple):
    """How the page draws, so that its pictures are like the run's own: a square with round strokes.

    side: of the picture that is sent, in pixels. width: of a stroke, in these.
    """

    side: int
    width: float
    paper: str = "#ffffff"
    ink: str = "#000000"


def drawn_like(run: Run) -> Drawn:
    """Omniglot's strokes are 5.4 of 105 pixels wide (drawn at 3, FOMAML's 1-shot run was right on 82 % and not on
    94 %); MNIST's are light on dark.
    """
    source = split_name(run.settings.source)[0]
    if source == "omniglot":
        return Drawn(105, 5.4)
    if source == "mnist":
        return Drawn(280, 25, "#000000", "#ffffff")
    side = min(448, 4 * max(reader_of(run).height, reader_of(run).width))
    return Drawn(side, side / 20)


def reader_of(run: Run) -> Pictures:
    """What reads the run's pictures.

    Raises:
        InputError: a run of rows.
    """
    intake = run.intake.intake if isinstance(run.intake, Embedded) else run.intake
    if not isinstance(intake, Pictures):
        raise InputError(
            f"{run.path} learned from {split_name(run.settings.source)[0]}, and the page takes pictures: a run of "
            "omniglot, mnist or a folder; fomaml adapt takes rows"
        )
    return intake


@dataclass
class Held:
    """What was adapted: a model for each number of steps, the last one is what is used."""

    by_steps: dict[int, AdaptedModel]

    @property
    def model(self) -> AdaptedModel:
        return list(self.by_steps.values())[-1]

    def probabilities(self, given: Any) -> list[Tensor]:
        """After each number of steps (pictures, classes)."""
        found = [own.predict(given).probabilities for own in self.by_steps.values()]
        return [own for own in found if own is not None]


@dataclass
class Demo:
    """A run of pictures and what has been made of it.

    steps: as for `Run.adapt`. save: the folder for models that are kept, a folder within for each.

    Raises:
        InputError: a run of rows; steps that are none; a `save` that is a file.
    """

    run: Run
    steps: Any = None
    save: Path | None = None
    held: OrderedDict[str, Held] = field(default_factory=OrderedDict)
    lock: Lock = field(default_factory=Lock)  # a module is of one thread at a time

    def __post_init__(self) -> None:
        self.reader = reader_of(self.run)
        settings = self.run.settings
        found = nearest(self.run.calibrations(), settings.ways, settings.shots)
        self.run.steps_of(self.steps, found)  # what does not go is said before anyone draws
        if self.save is not None and self.save.exists() and not self.save.is_dir():
            raise InputError(f"--save {self.save} is a file, expected a folder")

    def facts(self) -> dict[str, Any]:
        """What the page has to know, JSON-able."""
        settings = self.run.settings
        algorithm = ALGORITHMS[settings.algorithm]
        fixed = list(settings.facts["classes"]) if settings.fixed_classes and settings.facts else None
        return {
            "run": self.run.path.resolve().name,
            "learned": f"{algorithm.title} on {split_name(settings.source)[0]}, tasks of {settings.ways} classes with "
            f"{settings.shots} example{'s' if settings.shots > 1 else ''} each",
            "most": CLASSES if algorithm.any_ways else min(CLASSES, settings.ways),
            "fixed": fixed,
            "head_of_classes": algorithm.any_ways,
            "drawn": drawn_like(self.run)._asdict(),
            "save": self.save is not None,
            "most_bytes": BODY,
        }

    def adapt(self, asked: Any) -> dict[str, Any]:
        """Adapt to {"classes": [{"name": text, "pictures": [base64]}]}; what came of it, JSON-able.

        The curve is of the examples themselves: the mean probability of the right class, and the accuracy.

        Raises:
            InputError: anything else, too much, no picture, or classes that the run does not take.
        """
        given = self._classes(asked)
        with self.lock:
            start = time.perf_counter()
            read = {
                name: torch.cat(
                    [self._read(one, f"picture {n + 1} of {name!r}") for n, one in enumerate(own)]
                )
                for name, own in sorted(given.items())
            }
            taken = self.run.intake.labelled(read)
            model = self.run.adapt(taken, steps=self.steps)
            seconds = time.perf_counter() - start
            last = model.facts["steps"]
            size = sum(parameter.numel() for parameter in model.module.parameters())
            between = [n for n in AT if n < last] if size * (len(AT) + 1) <= PARAMETERS else [0] * (last > 0)
            held = Held({n: self.run.adapt(taken, steps=n) for n in between} | {last: model})
            assert model.classes is not None and isinstance(taken.labels, list)
            truth = torch.tensor([model.classes.index(label) for label in taken.labels])
            found = held.probabilities(taken)
            key = f"{time.time_ns():x}"
            self.held[key] = held
            while len(self.held) > HELD:
                self.held.popitem(last=False)
        return {
            "model": key,
            "classes": model.classes,
            "steps": list(held.by_steps),
            "examples": len(taken.names),
            "seconds": seconds,
            "probability": [own.gather(1, truth[:, None]).mean().item() for own in found],
            "accuracy": [(own.argmax(1) == truth).double().mean().item() for own in found],
            "worth": told(model.facts["calibration"], model.temperature, self.run.path),
        }

    def predict(self, asked: Any) -> dict[str, Any]:
        """What the model makes of {"model": key, "picture": base64}: probabilities after each number of steps.

        Raises:
            InputError: anything else, no picture, or a model that is no longer held.
        """
        data = _bytes(_of(asked, "picture", str), "the picture")
        with self.lock:
            held = self._held(asked)
            taken = self.run.intake.inputs(self._read(data, "the picture"))
            found = held.probabilities(taken)
        return {
            "classes": held.model.classes,
            "steps": list(held.by_steps),
            "probabilities": [own[0].tolist() for own in found],
        }

    def keep(self, asked: Any) -> dict[str, Any]:
        """Write the model of {"model": key} as `fomaml adapt` does, to the next free folder in `save`.

        Raises:
            InputError: no `save`; a folder that cannot be written.
        """
        if self.save is None:
            raise InputError("no folder to keep models in: start fomaml demo with --save FOLDER")
        with self.lock:
            held = self._held(asked)
            out = next(path for n in itertools.count(1) if not (path := self.save / f"adapted-{n}").exists())
            return {"saved": str(save_model(held.model, out))}

    def _classes(self, asked: Any) -> dict[str, list[bytes]]:
        """The files of each class."""
        given: dict[str, list[bytes]] = {}
        classes = _of(asked, "classes", list)
        if sum(len(_of(own, "pictures", list)) for own in classes) > PICTURES:
            raise InputError(f"more than {PICTURES} pictures: give fewer")
        for own in classes:
            name = _of(own, "name", str).strip()
            if not name or len(name) > LETTERS or not name.isprintable():
                raise InputError(f"a name has 1 to {LETTERS} printable letters, got {shown(name)}")
            if name in given:
                raise InputError(f"two classes have the name {name!r}: give each its own")
            if not own["pictures"]:
                raise InputError(f"{name!r} has no examples yet: draw or add one, or remove it")
            given[name] = [
                _bytes(text, f"picture {n + 1} of {name!r}") for n, text in enumerate(own["pictures"])
            ]
        if len(given) < 2:
            raise InputError(
                f"two classes or more are needed, got {'none' if not given else f'one, {next(iter(given))!r}'}: add "
                "examples of another"
            )
        return given

    def _read(self, data: bytes, name: str) -> Tensor:
        """One picture as the run takes it, once its header has been looked at. (1, channels, height, width)"""
        try:
            with opened_image(BytesIO(data)) as image:
                width, height = image.size
        except TooManyPixels:
            raise InputError(f"{name} has more than {PIXELS // 1_000_000} million pixels") from None
        except Exception:  # each of Pillow's plugins has its own
            raise InputError(
                f"{name} is no picture that can be read (PNG, JPEG, WebP, GIF, BMP, TIFF)"
            ) from None
        if width * height > PIXELS:
            raise InputError(
                f"{name} has more than {PIXELS // 1_000_000} million pixels, {width} by {height}"
            )
        try:
            inputs = self.reader.inputs(data).inputs
        except InputError as error:
            raise InputError(str(error).replace("picture 0", name, 1)) from None
        assert isinstance(inputs, Tensor)
        return inputs

    def _held(self, asked: Any) -> Held:
        key = _of(asked, "model", str)
        if key not in self.held:
            raise InputError("this adapted model is no longer held: press Adapt again")
        return self.held[key]


def _of(asked: Any, name: str, kind: type) -> Any:
    """The value of a key that must be there."""
    value = asked.get(name) if isinstance(asked, dict) else None
    if not isinstance(value, kind):
        raise InputError(f"the request has no {name!r} that is {'a list' if kind is list else 'text'}")
    return value


def _bytes(text: Any, name: str) -> bytes:
    try:
        if not isinstance(text, str):
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise InputError(f"{name} is not written in base64") from None
