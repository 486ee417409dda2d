"""Pictures that a run has never seen, made ready as its own were."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fomaml.data.folder import classes_in
from fomaml.data.images import Decoder, pillow, readable_suffixes
from fomaml.data.keys import as_column, key_of
from fomaml.data.source import ClassSource, pixels
from fomaml.errors import InputError, escaped
from fomaml.features import embed
from fomaml.serve.intake import Intake, Taken

Filter = Literal["lanczos", "nearest", "box", "bilinear"]


@dataclass(frozen=True)
class Pictures:
    """Images of one size: read, turned, coloured, resized and scaled as those of the run.

    mean, std: of the scaling, (x / 255 - mean) / std; or decode does it. inverted: dark ink on light paper becomes 255
    on 0, as of Omniglot. filter: of Pillow, to resize with.

    Inputs are a path or several, of files and of folders, which are searched; the bytes of a file; images of Pillow;
    arrays (height, width), (height, width, 3) or several of them; or tensors (examples, channels, height, width) that
    the model takes, of uint8 before the scaling. Labelled ones are a folder with a directory for each class, a dict
    from class to such inputs, or a pair (inputs, labels).
    """

    channels: int
    height: int
    width: int
    mean: float = 0.5
    std: float = 0.5
    inverted: bool = False
    filter: Filter = "lanczos"
    decode: Callable[[Tensor], Tensor] | None = None

    def inputs(self, given: Any) -> Taken:
        if isinstance(given, Tensor):
            return Taken(self.ready(given), [str(number) for number in range(len(given))])
        decoder = Decoder((self.height, self.width), "L" if self.channels == 1 else "RGB", self.filter)
        names, images = [], []
        for number, own in enumerate(self._several(given)):
            names.append(escaped(str(own)) if isinstance(own, Path) else f"picture {number}")
            file = None if isinstance(own, Path) else _as_file(own, names[-1])
            images.append(decoder.image(own if isinstance(own, Path) else Path(names[-1]), file))
        if not images:
            raise InputError("no pictures given")
        return Taken(self.ready(torch.from_numpy(np.stack(images))), names)

    def labelled(self, given: Any) -> Taken:
        if isinstance(given, str | os.PathLike):
            root = Path(given).expanduser()
            if not root.is_dir():
                raise InputError(
                    f"{root} is no folder, expected one with a directory of pictures for each class"
                )
            given = classes_in(root)
        if isinstance(given, Mapping):
            parts = {key_of(name): self.inputs(own) for name, own in given.items()}
            if not parts:
                raise InputError("no classes given")
            return Taken(
                torch.cat([part.inputs for part in parts.values()]),
                [name for part in parts.values() for name in part.names],
                [label for label, part in parts.items() for _ in part.names],
            )
        inputs, labels = _pair(given)
        taken = self.inputs(inputs)
        return taken._replace(labels=_texts(labels, len(taken.names)))

    def ready(self, images: Tensor) -> Tensor:
        """Pictures (examples, channels, height, width) of uint8 scaled as the model takes them; floating ones are."""
        shape = self.channels, self.height, self.width
        made_ready = images.is_floating_point()  # by a decoder that may give other channels
        if (
            images.dim() != 4
            or tuple(images.shape[2 if made_ready else 1 :]) != shape[1 if made_ready else 0 :]
        ):
            raise InputError(
                f"a tensor of pictures is (examples, {', '.join(map(str, shape))}) here, got {tuple(images.shape)}"
            )
        if made_ready:
            return images
        images = 255 - images if self.inverted else images
        return (self.decode or pixels(self.mean, self.std))(images)

    def _several(self, given: Any) -> Iterator[Any]:
        """One picture after the other: a path, the bytes of a file, an image of Pillow or an array."""
        if isinstance(given, str | os.PathLike):
            path = Path(given).expanduser()
            if path.is_dir():
                found = sorted(each for each in path.rglob("*") if each.suffix.lower() in readable_suffixes())
                if not (found := [each for each in found if not each.name.startswith(".")]):
                    raise InputError(f"{path} holds no picture")
                yield from found
            elif not path.exists():
                raise InputError(f"no file {path}")
            else:
                yield path
        elif isinstance(given, np.ndarray):
            one = given.ndim == 2 or (given.ndim == 3 and given.shape[2] in (1, 3, 4))
            if not one and given.ndim not in (3, 4):
                raise InputError(
                    f"a picture is an array (height, width) or (height, width, 3), got {given.shape}"
                )
            yield from [given] if one else given
        elif isinstance(given, bytes | pillow().Image):
            yield given
        elif isinstance(given, Iterable):
            for own in given:
                yield from self._several(own)
        else:
            raise InputError(f"a picture is a path, an image or an array, got a {type(given).__name__}")


def _as_file(given: Any, name: str) -> BytesIO:
    """The bytes of a file, or an image of Pillow or an array of whole numbers up to 255 as one of the same pixels."""
    if isinstance(given, bytes):
        return BytesIO(given)
    if isinstance(given, np.ndarray):
        given = given.astype(np.uint8) * 255 if given.dtype == bool else given
        if given.dtype != np.uint8:
            raise InputError(f"{name} is an array of {given.dtype}, expected uint8, 0 to 255")
        given = pillow().fromarray(given[..., 0] if given.ndim == 3 and given.shape[2] == 1 else given)
    file = BytesIO()
    given.save(file, "PNG")
    file.seek(0)
    return file


@dataclass(frozen=True)
class Embedded:
    """What a frozen network, or a layer of it, makes of the inputs of another intake."""

    intake: Intake
    network: nn.Module
    layer: str | None = None

    def inputs(self, given: Any) -> Taken:
        return self._embedded(self.intake.inputs(given))

    def labelled(self, given: Any) -> Taken:
        return self._embedded(self.intake.labelled(given))

    def _embedded(self, taken: Taken) -> Taken:
        if not isinstance(taken.inputs, Tensor):
            raise InputError("a frozen network runs over inputs that are one tensor, got several")
        source = ClassSource(taken.inputs, torch.zeros(len(taken.inputs), dtype=torch.int64))
        return taken._replace(inputs=embed(self.network, source, layer=self.layer).inputs)


def _pair(given: Any) -> tuple[Any, Any]:
    if not isinstance(given, tuple) or len(given) != 2:
        raise InputError(
            f"labelled examples are a folder, a dict from class to pictures or a pair (inputs, labels), got a "
            f"{type(given).__name__}"
        )
    return given


def _texts(labels: Any, number: int) -> list[str]:
    found = [key_of(value) for value in as_column(labels, "labels")]
    if len(found) != number:
        raise InputError(f"{number} inputs, but {len(found)} labels")
    return found
