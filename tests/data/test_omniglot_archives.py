"""An archive or folder of Omniglot that is not whole is named in one line."""

import sys

import numpy as np
import pytest

from fomaml.data.omniglot import load_omniglot
from fomaml.errors import InputError
from omniglot_files import (
    ARCHIVES,
    BACKGROUND,
    CONTENT,
    CUT,
    EVALUATION,
    FILES,
    FIRST,
    archive,
    assert_same,
    decoded_files,
    error_of,
    png,
    unpack,
    write,
)

pytestmark = pytest.mark.usefixtures("cache", "tiny")

CURE = "; give a folder that holds both of Omniglot's archives whole, or none to download them"
BAD = {
    "empty": (b"", "found 0 bytes (File is not a zip file), expected a whole zip archive"),
    "cut short": (ARCHIVES[BACKGROUND][:-100],
                  f"found {len(ARCHIVES[BACKGROUND]) - 100} bytes (File is not a zip file), "
                  "expected a whole zip archive"),
    "a web page": (b"<!DOCTYPE html>", "found 15 bytes (File is not a zip file), expected a whole zip archive"),
    "the other archive": (ARCHIVES[EVALUATION],
                          f"found {EVALUATION}/Angelic/character01/0000_01.png, "
                          f"expected {BACKGROUND}/ALPHABET/characterNN/NAME.png"),
    "no images": (archive([("README", b"")]), "found 0 characters, expected 6"),
    "a character too few": (archive([f for f in FILES.items() if "Latin/character03" not in f[0]]),
                            "found 5 characters, expected 6"),
    "a drawing too few": (archive([f for f in FILES.items() if f[0] != FIRST]),
                          "found 2 drawings of Greek/character01, expected 3"),
    "a drawing too many": (archive([*FILES.items(), (FIRST.replace("_01", "_09"), b"")]),
                           "found 4 drawings of Greek/character01, expected 3"),
    "an image elsewhere": (archive([*FILES.items(), (f"{BACKGROUND}/Greek/a.png", b"")]),
                           f"found {BACKGROUND}/Greek/a.png, "
                           f"expected {BACKGROUND}/ALPHABET/characterNN/NAME.png"),
    "an empty image": (archive({**FILES, FIRST: b""}.items()),
                       f"found {FIRST} damaged (cannot identify image file"),
    "half an image": (archive({**FILES, FIRST: CUT}.items()), f"found {FIRST} damaged ("),
    "not PNG": (archive({**FILES, FIRST: b"GIF89a"}.items()), f"found {FIRST} damaged ("),
    "another size": (archive({**FILES, FIRST: png(np.zeros((20, 22), np.uint8))}.items()),
                     f"found 22x20 pixels in {FIRST}, expected 21x21"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_is_named(root, cache, case):
    data, message = BAD[case]
    load_omniglot(root)  # what was decoded of the whole archive must not hide it
    path = root / f"{BACKGROUND}.zip"
    path.write_bytes(data)
    error = error_of(root)
    assert error.startswith(f"{path}: {message}")
    assert error.endswith(CURE)
    assert len(decoded_files(root, cache)) == 1


def test_flipped_bits_anywhere_in_an_archive_are_an_error_or_harmless(root):
    expected = load_omniglot(root)
    data = ARCHIVES[BACKGROUND]
    errors = 0
    for place in range(7, len(data), len(data) // 40):
        (root / f"{BACKGROUND}.zip").write_bytes(
            data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
        )
        try:
            assert_same(load_omniglot(root), expected)  # a time stamp, say
        except InputError as error:
            errors += 1
            assert str(error).startswith(f"{root / BACKGROUND}.zip: found ")
    assert errors > 20


def test_a_name_twice_in_an_archive_is_an_error(root):
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = archive([*FILES.items(), (FIRST, FILES[FIRST])])
    (root / f"{BACKGROUND}.zip").write_bytes(data)
    assert "found 4 drawings of Greek/character01, expected 3" in error_of(root)


def test_an_alphabet_in_both_archives_is_an_error(root):
    pairs = [(name.replace("Angelic", "Greek"), data) for name, data in CONTENT[EVALUATION].items()]
    path = root / f"{EVALUATION}.zip"
    path.write_bytes(archive(pairs))
    message = f"{path}: found the alphabet Greek, expected none of those in {BACKGROUND}.zip{CURE}"
    assert error_of(root) == message


def test_a_bad_folder_is_named(tmp_path):
    root = unpack(tmp_path / "unpacked")
    load_omniglot(root)
    (root / FIRST).write_bytes(CUT)
    assert error_of(root).startswith(f"{root / BACKGROUND}: found {FIRST} damaged (")
    (root / FIRST).unlink()
    message = f"{root / BACKGROUND}: found 2 drawings of Greek/character01, expected 3{CURE}"
    assert error_of(root) == message
    (root / FIRST).symlink_to(root / "nowhere")
    message = f"{root / FIRST}: No such file or directory, expected a part of Omniglot{CURE}"
    assert error_of(root) == message


def test_a_missing_half_is_named(tmp_path, root):
    (root / f"{EVALUATION}.zip").unlink()
    expected = f"expected {EVALUATION}.zip, the folder {EVALUATION}, or omniglot-py with either{CURE}"
    assert error_of(root) == f"{root}: found no {EVALUATION}, {expected}"
    assert error_of(tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'}: found no {BACKGROUND}, ")


def test_an_archive_that_cannot_be_read_is_named(root, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fomaml.data.omniglot.read_bytes", refuse)
    message = f"{root / BACKGROUND}.zip: Permission denied, expected a part of Omniglot{CURE}"
    assert error_of(root) == message


def test_without_pillow_the_extra_is_named_once_it_is_needed(root, tmp_path, monkeypatch):
    other = write(tmp_path / "other")
    expected = load_omniglot(root)
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert_same(load_omniglot(root), expected)
    assert error_of(other) == 'no Pillow, which reads images; pip install "fomaml[images]"'
