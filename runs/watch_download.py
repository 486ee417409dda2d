"""Convert the recordings that the package seglearn ships to watch.npz, which holds no pickled object.

pip download seglearn==1.2.5 --no-deps
python runs/watch_download.py seglearn-1.2.5-py3-none-any.whl watch.npz

The package's file is a pickled dict, and to unpickle a file is to run it. So this is the one place that does, and only
where the wheel is, to the bit, the one on PyPI. Data: D. Burns, arXiv 1802.01489, BSD licence.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fomaml.app.cli import told_in_one_line
from fomaml.app.parser import parse, positional
from fomaml.errors import InputError

WHEEL = "ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd"  # SHA-256 of seglearn 1.2.5
MEMBER = "seglearn/data/watch_dataset.npy"


@dataclass(frozen=True)
class Options:
    """Convert the smartwatch recordings of a wheel of seglearn 1.2.5."""

    wheel: Path = positional("the wheel, from pip download seglearn==1.2.5 --no-deps", metavar="WHEEL")
    out: Path = positional("the file to write", Path("watch.npz"), metavar="OUT")


def main(options: Options) -> None:
    if not options.wheel.exists():
        raise InputError(f"there is no {options.wheel}: pip download seglearn==1.2.5 --no-deps")
    content = options.wheel.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != WHEEL:
        raise InputError(
            f"{options.wheel} is not seglearn 1.2.5 as PyPI has it: SHA-256 {found}, expected {WHEEL}"
        )
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        data = np.load(io.BytesIO(wheel.read(MEMBER)), allow_pickle=True).item()
    np.savez_compressed(
        options.out,
        samples=np.concatenate(data["X"]).astype(np.float32),  # (samples, 6), one recording after the other
        lengths=np.array([len(recording) for recording in data["X"]]),
        exercise=data["y"],
        subject=data["subject"],
        right_arm=data["side"].astype(np.int64),
        channels=np.array(data["X_labels"]),
        exercises=np.array(data["y_labels"]),
    )


if __name__ == "__main__":
    with told_in_one_line():
        main(parse(Options))
