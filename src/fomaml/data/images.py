"""Files of images: how one is decoded, and many of them as one array, in memory or decoded when they are drawn."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from fomaml import regular
from fomaml.errors import InputError

log = logging.getLogger(__name__)

# Of Pillow's formats those of pixels alone. Others start programs (EPS), or hold files of several kinds.
FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "PPM", "ICO", "TGA", "PCX",
)  # fmt: skip
WIDE = ("I", "F")  # more than 8 bits a pixel, which Pillow's conversion clips to white
IN_MEMORY = (
    2 * 2**30
)  # bytes of images that are kept by default; while they are read, and augmented, some four times that
ORIENTATION = 0x0112  # the EXIF tag; from 5 on height and width change places


def pillow():
    """Pillow's `Image`, imported only where an image is decoded."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise InputError('no Pillow, which reads images; pip install "fomaml[images]"') from None
    return Image


def readable_formats() -> list[str]:
    """Those of `FORMATS` that this Pillow can open."""
    Image = pillow()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def readable_suffixes() -> set[str]:
    """The suffixes, in lower case, of the formats that are read."""
    known = readable_formats()
    return {suffix for suffix, name in pillow().registered_extensions().items() if name in known}


@contextlib.contextmanager
def opened_image(
    file: str | Path | IO[bytes], pixels: int = regular.PIXELS, formats: Sequence[str] | None = None
) -> Iterator[Any]:
    """An image of Pillow of which the header alone has been read; of a file's path, or of its bytes.

    pixels: how many it may say that it has. formats: Pillow's names of them; those of `FORMATS` by default.

    Raises:
        InputError: it is no ordinary file, of none of these formats, or too large; without the file's name.
        Exception: Pillow's plugins have their own for what is damaged.
    """
    Image = pillow()
    with contextlib.ExitStack() as stack:
        if isinstance(file, str | Path):
            regular.check_regular(file, regular.IMAGE)
            file = stack.enter_context(regular.opened(file))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check is below
                image = stack.enter_context(Image.open(file, formats=formats or readable_formats()))
        except Image.DecompressionBombError:
            raise _too_many(pixels) from None
        except Image.UnidentifiedImageError:
            raise InputError(f"it is of none of the formats {', '.join(formats or FORMATS)}") from None
        if image.width * image.height > pixels:
            raise _too_many(pixels)
        yield image


class TooManyPixels(InputError):
    """An image that says that it has more pixels than are decoded."""


def _too_many(pixels: int) -> TooManyPixels:
    return TooManyPixels(f"it has more than {pixels / 1e6:.3g} million pixels")


class Decoder:
    """Decodes images to one size and mode: "L" or "RGB".

    size: (height, width) to resize to; else all must have the size of the first one that is decoded or looked at.
    filter: of Pillow, to resize with.
    """

    def __init__(self, size: tuple[int, int] | None, mode: str, filter: str = "lanczos"):
        self.size = size
        self.mode = mode
        self.filter = filter
        self.first: tuple[Path, tuple[int, int]] | None = None

    def shape(self, path: Path) -> tuple[int, int, int]:
        """(channels, height, width) of all images, of which `path` is the first."""
        if self.size is None and self.first is None:
            self.look(path)
        high, wide = self.first[1][::-1] if self.first is not None else self.size or (0, 0)
        return len(self.mode), high, wide  # a letter of the mode is a channel

    def image(self, path: Path, file: Any = None) -> np.ndarray:
        """One image, uint8 (channels, height, width). file: its bytes, where `path` is but a name."""
        image = self._opened(path, self._decoded, file)
        if self.size is not None:
            image = image.resize(self.size[::-1], pillow().Resampling[self.filter.upper()])
        else:
            self._check_size(path, image.size)
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    def look(self, path: Path) -> None:
        """Raise `InputError` for a file that is no image, or one of the wrong kind or size, by its header alone."""
        if self.size is None:
            self._check_size(path, self._opened(path, _upright))
        else:
            self._opened(path, lambda file: None)

    def _opened(self, path: Path, function: Callable[[Any], Any], bytes: Any = None) -> Any:
        """What `function` gives of an image with 8 bits a channel."""
        found = None
        try:
            with opened_image(bytes or path) as file:
                mode = file.mode
                if not mode.startswith(WIDE):
                    found = function(file)
        except Exception as error:  # each of Pillow's plugins has its own
            why = " ".join((getattr(error, "strerror", None) or str(error)).split()) or type(error).__name__
            raise InputError(f"{path} cannot be read as an image ({why}); mend or remove it") from None
        if mode.startswith(WIDE):
            raise InputError(f"{path}: found pixels of mode {mode}, expected 8 bits a channel; convert it")
        return found

    def _decoded(self, file: Any) -> Any:
        from PIL import Image, ImageOps

        image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(self.mode)

    def _check_size(self, path: Path, size: tuple[int, int]) -> None:
        self.first = self.first or (path, size)
        if size != self.first[1]:
            (wide, high), (first_wide, first_high) = size, self.first[1]
            raise InputError(
                f"{path} is {high} high and {wide} wide, but {self.first[0]} is {first_high} high and "
                f"{first_wide} wide; give the size=(height, width) to resize to"
            )


class ImageFiles:
    """An array uint8 (images, channels, height, width) whose images are decoded when they are asked for."""

    dtype = np.dtype(np.uint8)
    reads_aside = True  # see `Stored`

    def __init__(self, paths: Sequence[Path], decoder: Decoder):
        self.paths, self.decoder = paths, decoder
        self.shape = (len(paths), *decoder.shape(paths[0]))

    def __getitem__(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for place, row in enumerate(rows):
            found[place] = self.decoder.image(self.paths[row])
        return found


def fit_in_memory(paths: Sequence[Path], decoder: Decoder, where: str) -> bool:
    """Whether images take no more than `IN_MEMORY`; else the log says that they are decoded when they are drawn."""
    size = len(paths) * math.prod(decoder.shape(paths[0]))
    if size > IN_MEMORY:
        log.info(
            "%s: %d images would take %.1f GiB, more than %.1f: they are decoded whenever they are drawn",
            *(where, len(paths), size / 2**30, IN_MEMORY / 2**30),
        )
    return size <= IN_MEMORY


def images_of(paths: Sequence[Path], decoder: Decoder, in_memory: bool) -> np.ndarray | ImageFiles:
    """All images as one array, decoded now, or when they are drawn, which are then looked at now.

    Raises:
        InputError: see `Decoder`.
    """
    files = ImageFiles(paths, decoder)
    if in_memory:
        return files[range(len(paths))]
    for path in paths:
        decoder.look(path)
    return files


def _upright(file: Any) -> tuple[int, int]:
    """(width, height) as the image's EXIF tag turns it."""
    if (
        file.width == file.height
    ):  # asked for the tag, a PNG without it is decoded to its end, where it may stand
        return file.size
    return file.size[::-1] if file.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8) else file.size
