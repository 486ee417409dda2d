"""Omniglot as it is read from a folder or its archives, and the real one where it is at hand."""

import hashlib
import io
import os
import random
import shutil
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from fomaml.data import omniglot
from fomaml.data.omniglot import load_omniglot
from omniglot_files import (
    ARCHIVES,
    BACKGROUND,
    CONTENT,
    EVALUATION,
    NAMES,
    PIXELS,
    SIDE,
    archive,
    assert_same,
    decoded_files,
    error_of,
    unpack,
    write,
)

REAL = os.environ.get("FOMAML_OMNIGLOT")  # a folder with the real archives

pytestmark = pytest.mark.usefixtures("cache", "tiny")


def test_the_constants_are_those_of_omniglot(monkeypatch):
    monkeypatch.undo()
    assert omniglot.CHARACTERS == {BACKGROUND: 964, EVALUATION: 659}
    assert (omniglot.DRAWINGS, omniglot.SIDE) == (20, 105)
    assert 1623 - sum(omniglot.MAML) == 423


@pytest.mark.parametrize("resize", ["lanczos", "box", "bilinear", "nearest"])
def test_images_are_ink_on_paper_in_grey_by_the_filter(root, resize):
    found = load_omniglot(root, split="background-evaluation", resize=resize, size=8)
    for source, half in ((found.train, BACKGROUND), (found.test, EVALUATION)):
        assert source.names == NAMES[half]
        assert source.counts.tolist() == [3] * len(source.names)
        assert source.inputs.dtype == torch.uint8
        assert source.inputs.shape == (3 * len(NAMES[half]), 1, 8, 8)
        filtered = Image.Resampling[resize.upper()]
        for image, name in zip(source.inputs, sorted(CONTENT[half])):
            expected = Image.fromarray(PIXELS[name]).resize((8, 8), filtered)
            assert np.array_equal(image[0], 255 - np.asarray(expected))
    assert found.origin == f"Omniglot in {root}, 8x8 by {resize}"


def test_nearest_is_what_pillow_does_to_one_bit_whatever_it_is_asked_for(root):
    found = load_omniglot(root, split="background-evaluation", resize="nearest", size=8)
    for image, name in zip(found.train.inputs, sorted(CONTENT[BACKGROUND])):
        file = Image.open(io.BytesIO(CONTENT[BACKGROUND][name]))
        assert file.mode == "1"
        trap = np.asarray(file.resize((8, 8), Image.Resampling.LANCZOS))
        assert np.array_equal(image[0] == 255, ~trap)
    assert found.train.inputs.unique().tolist() == [0, 255]
    lanczos = load_omniglot(root, split="background-evaluation", size=8)
    assert len(lanczos.train.inputs.unique()) > 50


def test_drawn_images_have_ink_1(root):
    source = load_omniglot(root, size=SIDE).train
    rows = torch.arange(len(source.inputs))
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            drawn = source.take(rows)
        finally:
            torch.set_default_dtype(torch.float32)
        assert drawn.dtype == dtype
        assert torch.equal(drawn, (source.inputs == 255).to(dtype))  # exactly 0 and 1


def test_by_default_the_images_are_28_by_28(root):
    assert load_omniglot(root).train.inputs.shape == (15, 1, 28, 28)


def test_the_order_of_the_archive_does_not_matter(root, tmp_path):
    shuffled = {}
    for half, files in CONTENT.items():
        pairs = list(files.items())
        random.Random(3).shuffle(pairs)
        shuffled[half] = archive(pairs)
    other = write(tmp_path / "other", shuffled)
    for split in ("maml", "background-evaluation"):
        assert_same(load_omniglot(root, split=split), load_omniglot(other, split=split))


def test_unpacked_folders_and_torchvisions_layout_are_read_too(root, tmp_path):
    expected = load_omniglot(root)
    assert_same(load_omniglot(unpack(tmp_path / "unpacked")), expected)
    assert_same(load_omniglot(write(tmp_path / "layout" / "omniglot-py").parent), expected)
    assert_same(load_omniglot(unpack(tmp_path / "folders" / "omniglot-py").parent), expected)
    assert_same(load_omniglot(str(root)), expected)
    half = unpack(tmp_path / "half")
    shutil.rmtree(half / EVALUATION)
    write(half, {EVALUATION: ARCHIVES[EVALUATION]})
    assert_same(load_omniglot(half), expected)


def test_the_archive_comes_before_the_folder_and_nothing_is_unpacked(root):
    (root / BACKGROUND).mkdir()
    (root / BACKGROUND / "rubbish.png").write_bytes(b"")
    load_omniglot(root)
    names = {path.name for path in root.rglob("*")} - {path.name for path in decoded_files(root)}
    assert names == {f"{BACKGROUND}.zip", f"{EVALUATION}.zip", BACKGROUND, "rubbish.png"}


def test_directories_hidden_files_and_texts_in_an_archive_are_passed_over(tmp_path, root):
    extra = [
        (f"{BACKGROUND}/", b""),
        (f"{BACKGROUND}/Greek/", b""),
        (f"{BACKGROUND}/.DS_Store", b"1"),
        (f"__MACOSX/{BACKGROUND}/Greek/._0000_01.png", b"2"),
        (f"{BACKGROUND}/Greek/character01/._0000_01.png", b"3"),
        (f"{BACKGROUND}/README.txt", b"4"),
    ]
    files = [*extra, *CONTENT[BACKGROUND].items()]
    other = write(tmp_path / "other", {**ARCHIVES, BACKGROUND: archive(files)})
    assert_same(load_omniglot(other), load_omniglot(root))


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "characters")
    assert len(load_omniglot("~/characters").train) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "lake"}, "split must be one of maml, vinyals, background-evaluation, got 'lake'"),
        ({"resize": "cubic"}, "resize must be one of lanczos, nearest, box, bilinear, got 'cubic'"),
        ({"size": 0}, "size must be a whole number of 1 or more, got 0"),
        ({"size": (28, 28)}, "size must be a whole number of 1 or more, got (28, 28)"),
        ({"seed": None}, "seed must be a whole number, got None"),
    ],
)
def test_an_option_of_no_meaning_is_an_error(root, options, message):
    assert error_of(root, **options) == message


@pytest.mark.skipif(not REAL, reason="FOMAML_OMNIGLOT names no folder with the real archives")
def test_the_real_omniglot(cache, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "real"))
    load = partial(load_omniglot, REAL, resize="nearest", cache=tmp_path / "real")
    found = load()  # 5 s on one core; with lanczos 9 s
    start = time.thread_time()  # which other programs do not take
    maml = load()
    assert time.thread_time() - start < 5  # it takes a quarter of a second
    assert_same(maml, found)
    vinyals, lake = load(split="vinyals"), load(split="background-evaluation")
    assert [len(part) for part in maml[:3]] == [1100, 100, 423]
    assert [len(part) for part in vinyals[:3]] == [1028, 172, 423]
    assert (len(lake.train), lake.validation, len(lake.test)) == (964, None, 659)
    names = lake.train.names + lake.test.names
    for three in (maml, vinyals):
        assert sorted(n for part in three[:3] for n in part.names) == sorted(names)
    assert len(set(names)) == 1623
    assert maml.train.names[:2] == ["Gurmukhi/character23", "Malayalam/character36"]
    shuffled = "\n".join(n for part in maml[:3] for n in part.names)
    assert hashlib.sha256(shuffled.encode()).hexdigest()[:16] == "3dfcf2bce87c9b5b"
    assert maml.train.inputs.shape == (22_000, 1, 28, 28)
    ink = lake.train.take(torch.arange(lake.train.inputs.shape[0])).mean()
    assert 0.05 < ink < 0.2
    twins = lake.train.select(["Braille/character01"]).inputs  # drawings 03 and 19
    assert torch.equal(twins[2], twins[18]) and not torch.equal(twins[2], twins[3])
