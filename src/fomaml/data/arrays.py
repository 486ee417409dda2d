"""Named arrays of an .npz file, or of a folder of .npy files, which are mapped instead of read. No pickle."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fomaml import regular
from fomaml.choices import nearest_first
from fomaml.errors import InputError, in_one_line
from fomaml.memory import check_fits

ARRAY = b"\x93NUMPY"  # the first bytes of one array
DEFLATE = 1032  # how often zlib can repeat a byte that is there


class Arrays(Mapping[str, Any]):
    """The arrays of a file.npz, each read when it is asked for; or of a folder with a file KEY.npy for each.

    Raises:
        InputError: no such file, a damaged one, one without arrays; no such key, an array of objects.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self._is_folder = self.path.is_dir()
        try:
            if self._is_folder:
                self._keys = sorted(file.stem for file in self.path.glob("*.npy"))
            else:
                with regular.opened(self.path) as file:
                    if file.read(len(ARRAY)) == ARRAY:
                        raise InputError(
                            f"{self.path} holds one array without a name, expected an .npz file or a folder"
                        )
                    self._keys = [name.removesuffix(".npy") for name in zipfile.ZipFile(file).namelist()]
        except FileNotFoundError:
            raise InputError(f"no file {self.path}") from None
        except InputError:
            raise
        except Exception as error:  # zipfile has many for a damaged directory
            raise InputError(
                f"{self.path} cannot be read as an .npz file ({_why(error)}); numpy.savez writes one"
            ) from None
        if not self._keys:
            raise InputError(f"{self.path} holds no arrays")

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._keys:
            raise InputError(f"{self.path} has no array {key!r}; there are: {nearest_first(key, self._keys)}")
        try:
            if self._is_folder:
                path = self.path / f"{key}.npy"
                regular.check_regular(path)
                return np.load(path, mmap_mode="r", allow_pickle=False)
            with regular.opened(self.path) as file, zipfile.ZipFile(file) as archive:
                return _member(archive, key, self.path)
        except InputError:
            raise
        except MemoryError as error:
            raise InputError(f"the array {key!r} of {self.path} does not fit into memory ({error})") from None
        except (
            Exception
        ) as error:  # numpy, zipfile, zlib and Python's own parser have many for what is damaged
            objects = "allow_pickle" in str(error) or "Python objects" in str(error)
            why = (
                "an object array, which may hold anything and is never unpickled: save it as an array of numbers or of "
                "text of one dtype"
                if objects
                else f"damaged ({_why(error)})"
            )
            raise InputError(f"the array {key!r} of {self.path} is {why}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _member(archive: zipfile.ZipFile, key: str, path: Path) -> np.ndarray:
    """An array of an archive, whose sizes, those declared and those there, are compared before it is read."""
    names = set(archive.namelist())
    member = archive.getinfo(key if key in names else f"{key}.npy")
    packed, size, name = member.compress_size, member.file_size, f"the array {key!r} of {path}"
    there = regular.check_regular(path)
    stored = member.compress_type == zipfile.ZIP_STORED
    if not stored and member.compress_type != zipfile.ZIP_DEFLATED:
        raise ValueError("it is packed in a way that numpy does not write")
    if packed > there or (stored and size != packed) or size > DEFLATE * packed:
        raise ValueError(f"it cannot have {size} bytes in an archive of {there}")
    regular.check_unpacked(name, size, packed)
    check_fits(name, size, "give a folder of .npy files, which are mapped")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        needed = math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and (min(shape, default=0) < 0 or needed != size - file.tell()):
            raise ValueError(f"its header speaks of {needed} bytes, and {size - file.tell()} follow it")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def together(arrays: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The array of the one key, or a dict of those of several."""
    return arrays[keys[0]] if len(keys) == 1 else {key: arrays[key] for key in keys}


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or in_one_line(error)
