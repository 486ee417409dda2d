"""A tiny Omniglot of random drawings, whole or damaged: archives as bytes, and what is decoded of them."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fomaml.data.omniglot import load_omniglot
from fomaml.errors import InputError

BACKGROUND, EVALUATION = "images_background", "images_evaluation"
NAMES = {
    BACKGROUND: [f"{a}/character{n:02}" for a in ("Greek", "Latin") for n in (1, 2, 3)],
    EVALUATION: [f"{a}/character{n:02}" for a in ("Angelic", "Manipuri") for n in (1, 2)],
}
ALL = sorted(NAMES[BACKGROUND] + NAMES[EVALUATION])
SIDE = 21


def png(array, mode="1"):
    """The PNG file of an array of paper (255) and ink (0)."""
    file = io.BytesIO()
    Image.fromarray(array).convert(mode).save(file, "png")
    return file.getvalue()


def drawings():
    """The files of both halves: {half: {name in the archive: PNG}}, and the pixels by that name."""
    content, pixels, shades = {}, {}, np.random.default_rng(0)
    for half, characters in NAMES.items():
        content[half] = {}
        for number, character in enumerate(characters):
            for drawing in (1, 2, 3):
                name = f"{half}/{character}/{number:04}_{drawing:02}.png"
                pixels[name] = 255 * shades.integers(0, 2, (SIDE, SIDE), dtype=np.uint8)
                content[half][name] = png(pixels[name])
    return content, pixels


CONTENT, PIXELS = drawings()
FILES = CONTENT[BACKGROUND]
FIRST = f"{BACKGROUND}/Greek/character01/0000_01.png"
CUT = FILES[FIRST][:-30]


def archive(files):
    """The zip file of (name, bytes) pairs."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in files:
            target.writestr(name, content)
    return data.getvalue()


ARCHIVES = {half: archive(files.items()) for half, files in CONTENT.items()}


def write(root, archives=ARCHIVES):
    root.mkdir(parents=True, exist_ok=True)
    for half, data in archives.items():
        (root / f"{half}.zip").write_bytes(data)
    return root


def unpack(root):
    for name, data in {**CONTENT[BACKGROUND], **CONTENT[EVALUATION]}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def assert_same(one, other):
    assert one.split == other.split
    for a, b in zip(one[:3], other[:3]):
        assert (a is None) == (b is None)
        assert a is None or (a.names == b.names and torch.equal(a.inputs, b.inputs))


def decoded_files(*folders):
    return [path for folder in folders for path in folder.rglob("*.safetensors")]


def error_of(*args, **options):
    with pytest.raises(InputError) as error:
        load_omniglot(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
