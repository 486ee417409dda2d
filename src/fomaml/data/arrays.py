"""Named arrays of an .npz file, or of a folder of .npy files, which are mapped instead of read. No pickle."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fomaml.choices import nearest_first
from fomaml.errors import InputError, in_one_line
from fomaml.memory import check_fits, in_units
from fomaml.regular import regular

LARGE, RATIO = (
    2**28,
    100,
)  # bytes of an array that is looked at twice, and how many times smaller one is believed


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
                with open(regular(self.path), "rb") as file:
                    found = np.load(file, allow_pickle=False)
                    for info in found.zip.infolist() if hasattr(found, "zip") else ():
                        _check_member(found.zip, info)
                    self._keys = list(getattr(found, "files", ()))
                    if not hasattr(found, "files"):
                        raise InputError(
                            f"{self.path} holds one array without a name, expected an .npz file or a folder"
                        )
        except FileNotFoundError:
            raise InputError(f"no file {self.path}") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, InputError):
                raise
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
                return np.load(regular(self.path / f"{key}.npy"), mmap_mode="r", allow_pickle=False)
            with open(self.path, "rb") as file:
                return np.load(file, allow_pickle=False)[key]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
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


def together(arrays: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The array of the one key, or a dict of those of several."""
    return arrays[keys[0]] if len(keys) == 1 else {key: arrays[key] for key in keys}


def _check_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Raise `InputError` where an array of an archive is not as large as it is declared, or cannot be meant.

    What deflates to a hundredth is no measurement; so a small file does not fill the memory.
    """
    declared = _declared(archive, info)
    if declared is not None and declared > info.file_size:
        raise InputError(
            f"{archive.filename or 'the archive'}: {info.filename} declares {in_units(declared)}, and has "
            f"{in_units(info.file_size)}"
        )
    if info.file_size > LARGE and info.file_size > RATIO * max(1, info.compress_size):
        raise InputError(
            f"{info.filename} would expand from {in_units(info.compress_size)} to {in_units(info.file_size)}: save it "
            "as it is, numpy.savez"
        )
    check_fits(f"the array {info.filename}", info.file_size, "give a folder of .npy files, which are mapped")


def _declared(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int | None:
    """The bytes of an array by its own header; None of objects, and of what is no array."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(info) as member:
        try:
            read = readers.get(np.lib.format.read_magic(member))
            if read is None:
                return None
            shape, _, dtype = read(member)
        except ValueError:
            return None
    return None if dtype.hasobject else math.prod(shape) * dtype.itemsize


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or in_one_line(error)
