"""Named arrays of an .npz file, or of a folder of .npy files, which are mapped instead of read. No pickle."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fomaml.choices import nearest_first
from fomaml.errors import InputError, in_one_line


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
                with open(self.path, "rb") as file:
                    found = np.load(file, allow_pickle=False)
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
                return np.load(self.path / f"{key}.npy", mmap_mode="r", allow_pickle=False)
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


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or in_one_line(error)
