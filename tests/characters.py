"""A small Omniglot of made-up characters that a network can tell apart, in the layout of the real archives."""

import io
import zipfile

import numpy as np
from PIL import Image

from fomaml.app.settle import settle
from fomaml.data import omniglot

HALVES = {"images_background": 40, "images_evaluation": 26}  # characters
SPLIT = (24, 21)  # for training and for validation, 21 for test: enough for 20 ways
DRAWINGS, SIDE = 20, 28


def write(root):
    """Both archives in the folder `root`."""
    root.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number, (half, characters) in enumerate(HALVES.items()):
        with zipfile.ZipFile(root / f"{half}.zip", "w") as archive:
            for character in range(characters):
                shape = np.kron(random.integers(0, 2, (7, 7)), np.ones((4, 4))).astype(bool)
                for drawing in range(DRAWINGS):
                    ink = shape ^ (random.random((SIDE, SIDE)) < 0.1)
                    file = io.BytesIO()
                    Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert("1").save(file, "png")
                    name = f"{half}/Script{number}/character{character:02}/{drawing:02}.png"
                    archive.writestr(name, file.getvalue())
    return root


def shrink(monkeypatch):
    """Let the loader expect these counts."""
    monkeypatch.setattr(omniglot, "CHARACTERS", HALVES)
    monkeypatch.setattr(omniglot, "DRAWINGS", DRAWINGS)
    monkeypatch.setattr(omniglot, "SIDE", SIDE)
    monkeypatch.setattr(omniglot, "MAML", SPLIT)


def settings(**options):
    """Those of a small network on it."""
    return settle(**{"source": "omniglot", "model": "conv4-strided", "channels": (4,), **options})
