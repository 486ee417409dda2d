"""The images of Omniglot are decoded once and kept, beside the data or in the cache."""

import numpy as np
import pytest
import torch

from fomaml.data import omniglot
from fomaml.data.omniglot import load_omniglot
from omniglot_files import (
    BACKGROUND,
    FILES,
    FIRST,
    NAMES,
    SIDE,
    archive,
    assert_same,
    decoded_files,
    png,
    write,
)

pytestmark = pytest.mark.usefixtures("cache", "tiny")


def forbid_decoding(monkeypatch):
    monkeypatch.setattr(omniglot, "_decode", lambda *_: pytest.fail("decoded again"))


def test_images_are_decoded_once_beside_the_data(root, cache, monkeypatch):
    first = load_omniglot(root)
    assert [path.parent for path in decoded_files(root, cache)] == [root]
    forbid_decoding(monkeypatch)
    assert_same(load_omniglot(root), first)
    load_omniglot(root, split="background-evaluation")
    assert not cache.exists()
    assert [path for path in root.iterdir() if path.name.startswith(".")] == []


def test_each_size_filter_and_content_has_its_own(root):
    for count, (size, resize) in enumerate([(28, "lanczos"), (28, "box"), (8, "box")], start=1):
        load_omniglot(root, size=size, resize=resize)
        assert len(decoded_files(root)) == count
    first = load_omniglot(root, split="background-evaluation")
    changed = {FIRST: png(np.zeros((SIDE, SIDE), np.uint8))}
    write(root, {BACKGROUND: archive({**FILES, **changed}.items())})
    second = load_omniglot(root, split="background-evaluation")
    assert len(decoded_files(root)) == 4
    assert not torch.equal(second.train.inputs[0], first.train.inputs[0])
    assert (second.train.inputs[0] == 255).all()
    assert torch.equal(second.train.inputs[1:], first.train.inputs[1:])


def test_the_folder_for_them_can_be_given(root, tmp_path, cache, monkeypatch):
    given = tmp_path / "deep" / "given"
    first = load_omniglot(root, cache=given)
    assert [path.parent for path in decoded_files(tmp_path)] == [given]
    forbid_decoding(monkeypatch)
    assert_same(load_omniglot(root, cache=str(given)), first)


def test_a_read_only_folder_leaves_them_to_the_users_cache(root, cache, monkeypatch):
    root.chmod(0o555)
    try:
        first = load_omniglot(root)
        assert [path.parent for path in decoded_files(root, cache)] == [cache]
        forbid_decoding(monkeypatch)
        assert_same(load_omniglot(root), first)
    finally:
        root.chmod(0o755)


def test_where_nothing_can_be_written_they_are_decoded_each_time(root, cache, tmp_path):
    expected = load_omniglot(root, cache=tmp_path / "given")
    cache.parent.write_text("a file where a folder should be")
    root.chmod(0o555)
    try:
        assert_same(load_omniglot(root), expected)
        assert decoded_files(root) == []
    finally:
        root.chmod(0o755)
    assert_same(load_omniglot(root, cache=cache.parent), expected)


@pytest.mark.parametrize(
    "damage", ["a bit of an image", "a bit of a name", "cut", "empty", "rubbish", "folder"]
)
def test_a_damaged_one_is_made_again(root, damage, capfd):
    expected = load_omniglot(root)
    (path,) = decoded_files(root)
    data = bytearray(path.read_bytes())
    if damage == "a bit of an image":
        data[-1] ^= 1
    elif damage == "a bit of a name":
        place = data.index(b"Greek")
        data[place] ^= 1
    elif damage == "cut":
        data = data[: len(data) // 2]
    elif damage in ("empty", "folder"):
        data = b""
    else:
        data = b"\x80" * 100
    path.write_bytes(data)
    if damage == "folder":
        path.unlink()
        path.mkdir()
    assert_same(load_omniglot(root), expected)
    if damage != "folder":
        (again,) = decoded_files(root)
        assert again == path
        assert omniglot._read_cache(path, 28)[1] == list(NAMES.values())
    assert capfd.readouterr() == ("", "")


def test_one_of_other_counts_is_made_again(root, monkeypatch):
    expected = load_omniglot(root)
    (path,) = decoded_files(root)
    images, names = omniglot._read_cache(path, 28)
    assert omniglot._write_cache(path, images[:-1], names)
    assert omniglot._read_cache(path, 28) is None
    assert omniglot._write_cache(path, images, [names[0][1:], names[1]])
    assert omniglot._read_cache(path, 28) is None
    assert_same(load_omniglot(root), expected)
    assert omniglot._read_cache(path, 28) is not None
    assert omniglot._read_cache(path, 27) is None
