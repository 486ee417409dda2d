import hashlib
import http.server
import io
import os
import random
import shutil
import socket
import sys
import threading
import time
import zipfile
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fomaml.data import download, omniglot
from fomaml.data.omniglot import load_omniglot
from fomaml.errors import InputError

BACKGROUND, EVALUATION = "images_background", "images_evaluation"
NAMES = {
    BACKGROUND: [f"{a}/character{n:02}" for a in ("Greek", "Latin") for n in (1, 2, 3)],
    EVALUATION: [f"{a}/character{n:02}" for a in ("Angelic", "Manipuri") for n in (1, 2)],
}
ALL = sorted(NAMES[BACKGROUND] + NAMES[EVALUATION])
SIDE = 21
CURE = "; give a folder that holds both of Omniglot's archives whole, or none to download them"
REAL = os.environ.get("FOMAML_OMNIGLOT")  # a folder with the real archives


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


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Omniglot is small, the user's cache is a new folder, and no real server or proxy is ever asked."""
    from torchvision import datasets

    monkeypatch.setattr(omniglot, "CHARACTERS", {half: len(names) for half, names in NAMES.items()})
    monkeypatch.setattr(omniglot, "DRAWINGS", 3)
    monkeypatch.setattr(omniglot, "SIDE", SIDE)
    monkeypatch.setattr(omniglot, "MAML", (5, 2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.Omniglot, "download_url_prefix", "http://127.0.0.1:9")
    return tmp_path / "cache" / "fomaml"


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "data")


def forbid_decoding(monkeypatch):
    monkeypatch.setattr(omniglot, "_decode", lambda *_: pytest.fail("decoded again"))


# --- what is read ---------------------------------------------------------------------------------


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


# --- the splits -----------------------------------------------------------------------------------


def write_vinyals(root, parts=None, rotations=omniglot.ROTATIONS):
    for part, names in (parts or {"train": ALL[:5], "val": ALL[5:7], "test": ALL[7:]}).items():
        lines = [f"{name}/{rotation}\n" for name in names for rotation in rotations]
        (root / f"vinyals_{part}.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("split", ["maml", "vinyals"])
def test_the_three_parts_share_no_character_and_miss_none(root, split):
    write_vinyals(root)
    found = load_omniglot(root, split=split)
    parts = [set(part.names) for part in found[:3]]
    assert [len(part) for part in parts] == [5, 2, 3]
    assert all(a.isdisjoint(b) for a, b in combinations(parts, 2))
    assert set.union(*parts) == set(ALL)
    whole = load_omniglot(root, split="background-evaluation")
    for part in found[:3]:  # each drawing is with its own name
        for name in part.names:
            half = whole.train if name in whole.train.names else whole.test
            assert torch.equal(part.select([name]).inputs, half.select([name]).inputs)


def test_background_and_evaluation_share_no_alphabet(root):
    found = load_omniglot(root, split="background-evaluation")
    assert (found.split, found.validation) == ("background-evaluation", None)
    alphabets = [{name.partition("/")[0] for name in part.names} for part in (found.train, found.test)]
    assert alphabets == [{"Greek", "Latin"}, {"Angelic", "Manipuri"}]


def test_mamls_split_is_a_shuffle_of_the_sorted_names_by_the_seed(root):
    shuffled = list(ALL)
    random.Random(1).shuffle(shuffled)
    first = load_omniglot(root)
    assert first.split == "maml, seed 1"
    assert [part.names for part in first[:3]] == [shuffled[:5], shuffled[5:7], shuffled[7:]]
    assert_same(load_omniglot(root), first)
    other = load_omniglot(root, seed=2)
    assert other.split == "maml, seed 2" and other.train.names != first.train.names


def test_pythons_shuffle_has_not_changed():
    numbers = list(range(10))
    random.Random(1).shuffle(numbers)
    assert numbers == [6, 8, 9, 7, 5, 3, 0, 4, 1, 2]


def test_vinyals_split_is_the_text_files(root, tmp_path):
    write_vinyals(root)
    found = load_omniglot(root, split="vinyals")
    assert found.split == "vinyals"
    assert [part.names for part in found[:3]] == [ALL[:5], ALL[5:7], ALL[7:]]
    layout = write(tmp_path / "layout" / "omniglot-py").parent
    assert_same(load_omniglot(write_vinyals(layout), split="vinyals"), found)
    for path in layout.glob("*.txt"):
        path.rename(layout / "omniglot-py" / path.name)
    assert_same(load_omniglot(layout, split="vinyals"), found)


def test_missing_text_files_are_named(root):
    files = "vinyals_train.txt, vinyals_val.txt, vinyals_test.txt"
    end = "for the split vinyals; add them, or take the split maml or background-evaluation"
    text = f"expected the text files {files} beside the data {end}"
    assert error_of(root, split="vinyals") == f"{root}: no {files}, {text}"
    (write_vinyals(root) / "vinyals_val.txt").unlink()
    assert error_of(root, split="vinyals") == f"{root}: no vinyals_val.txt, {text}"


LINE = "ALPHABET/characterNN/rotDDD of one of the 10 characters"
BAD_TEXTS = {
    "no such character": ("val", "Klingon/character01/rot000\n",
                          f"found the line 'Klingon/character01/rot000', expected {LINE}"),
    "no rotation": ("val", f"{ALL[5]}\n", f"found the line '{ALL[5]}', expected {LINE}"),
    "no such rotation": ("val", f"{ALL[5]}/rot045\n",
                         f"found the line '{ALL[5]}/rot045', expected {LINE}"),
    "binary": ("val", b"\xff\n", f"found the line '\ufffd', expected {LINE}"),
    "twice in a file": ("train", f"{ALL[0]}/rot090\n",
                        f"found {ALL[0]}/rot090 once more after vinyals_train.txt, expected it once"),
    "in two files": ("test", f"{ALL[0]}/rot000\n",
                     f"found {ALL[0]}/rot000 once more after vinyals_train.txt, expected it once"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_bad_text_file_is_named(root, case):
    part, line, message = BAD_TEXTS[case]
    path = write_vinyals(root) / f"vinyals_{part}.txt"
    path.write_bytes(path.read_bytes() + (line if isinstance(line, bytes) else line.encode()))
    assert (
        error_of(root, split="vinyals") == f"{path}: {message}; take Vinyals et al.'s text files as they are"
    )


def test_a_character_whose_rotations_are_in_two_text_files_is_an_error(root):
    train, test = (write_vinyals(root) / f"vinyals_{part}.txt" for part in ("train", "test"))
    line = f"{ALL[0]}/rot270\n"
    train.write_text(train.read_text().replace(line, ""))
    test.write_text(test.read_text() + line)
    message = f"{test}: found {ALL[0]}/rot270 once more after vinyals_train.txt, expected it once"
    assert error_of(root, split="vinyals").startswith(message)


def test_text_files_that_leave_out_a_character_or_a_part_are_named(root):
    write_vinyals(root, {"train": ALL[:5], "val": ALL[5:7], "test": ALL[7:-1]})
    message = (
        f"found 1 of 10 characters without all rotations, first {ALL[-1]}, expected each in all of rot000"
    )
    assert message in error_of(root, split="vinyals")
    write_vinyals(root, rotations=omniglot.ROTATIONS[:3])
    assert "found 10 of 10 characters without all rotations" in error_of(root, split="vinyals")
    write_vinyals(root, {"train": ALL[:7], "val": [], "test": ALL[7:]})
    message = f"{root / 'vinyals_val.txt'}: found an empty file, expected the characters of a part"
    assert error_of(root, split="vinyals").startswith(message)


# --- bad archives ---------------------------------------------------------------------------------

FILES = CONTENT[BACKGROUND]
FIRST = f"{BACKGROUND}/Greek/character01/0000_01.png"
CUT = FILES[FIRST][:-30]
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

    monkeypatch.setattr(Path, "read_bytes", refuse)
    message = f"{root / BACKGROUND}.zip: Permission denied, expected a part of Omniglot{CURE}"
    assert error_of(root) == message


def test_without_pillow_the_extra_is_named_once_it_is_needed(root, tmp_path, monkeypatch):
    other = write(tmp_path / "other")
    expected = load_omniglot(root)
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert_same(load_omniglot(root), expected)
    assert error_of(other) == 'no Pillow, which reads images; pip install "fomaml[images]"'


# --- the decoded images ---------------------------------------------------------------------------


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


# --- the download ---------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine that has the small archives, whose md5 torchvision is told."""
    from torchvision import datasets

    folder = write(tmp_path / "server")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    asked = []
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
    thread.start()
    url = f"http://127.0.0.1:{serving.server_port}"
    monkeypatch.setattr(datasets.Omniglot, "download_url_prefix", url)
    md5 = {half: hashlib.md5(data).hexdigest() for half, data in ARCHIVES.items()}
    monkeypatch.setattr(datasets.Omniglot, "zips_md5", md5)
    yield folder, asked
    serving.shutdown()
    thread.join()
    serving.server_close()


GIVE = f"give the folder that holds {BACKGROUND}.zip and {EVALUATION}.zip"


def test_downloads_once_through_torchvision(root, cache, server, monkeypatch, capfd, said):
    timeout = socket.getdefaulttimeout()
    found = load_omniglot()
    place = cache / "omniglot-py"
    assert found.origin == f"Omniglot in {place}, 28x28 by lanczos"
    assert_same(found, load_omniglot(root))
    assert said() == [("INFO", f"downloading Omniglot to {place}")]
    assert capfd.readouterr() == ("", "")
    kept = {path.name for path in place.iterdir() if path.suffix != ".safetensors"}
    assert kept == {f"{BACKGROUND}.zip", f"{EVALUATION}.zip"}
    assert socket.getdefaulttimeout() == timeout
    asked = list(server[1])
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert_same(load_omniglot(), found)
    assert_same(load_omniglot(allow_download=False), found)
    assert server[1] == asked
    assert said() == [] and capfd.readouterr() == ("", "")


def test_only_what_is_missing_is_downloaded(cache, server):
    write(cache / "omniglot-py", {BACKGROUND: ARCHIVES[BACKGROUND]})
    load_omniglot()
    assert {path for path in server[1] if BACKGROUND in path} == set()


def test_a_damaged_download_is_named_and_to_be_deleted(cache):
    write(cache / "omniglot-py")
    path = cache / "omniglot-py" / f"{EVALUATION}.zip"
    path.write_bytes(ARCHIVES[EVALUATION][:-50])
    error = error_of()
    assert error.startswith(f"{path}: found ")
    assert error.endswith("; delete it, and the next run downloads it again")


def test_a_download_that_fails_its_md5_leaves_nothing(cache, server):
    path = server[0] / f"{BACKGROUND}.zip"
    path.write_bytes(path.read_bytes()[:-3])
    error = error_of()
    assert error == f"Omniglot was not downloaded (File not found or corrupted.); {GIVE}"
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_without_a_network_the_error_comes_fast(cache):
    start = time.perf_counter()
    error = error_of()
    assert time.perf_counter() - start < download.SECONDS
    assert error == f"Omniglot was not downloaded (no answer from http://127.0.0.1:9/); {GIVE}"
    assert not cache.exists()


def test_no_download_where_none_is_allowed(cache, server):
    error = error_of(allow_download=False)
    assert error == f"no Omniglot in {cache / 'omniglot-py'}, and downloads are not allowed; {GIVE}"
    assert server[1] == []


def test_without_torchvision_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.setitem(sys.modules, name, None)
    error = error_of()
    assert error.startswith("Omniglot was not downloaded (import of torchvision")
    assert error.endswith(f'; pip install "fomaml[mnist]", whose torchvision downloads it, or {GIVE}')


# --- the real one ---------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL, reason="FOMAML_OMNIGLOT names no folder with the real archives")
def test_the_real_omniglot(cache, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "real"))
    load = partial(load_omniglot, REAL, resize="nearest", cache=tmp_path / "real")
    found = load()  # 5 s on one core; with lanczos 9 s
    start = time.perf_counter()
    maml = load()
    assert time.perf_counter() - start < 5  # a quarter of a second on a machine that does nothing else
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
