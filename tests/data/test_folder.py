import io
import os
import random
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from fomaml.data.folder import load_folder
from fomaml.errors import InputError


def grey(seed, height=6, width=6):
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def rgb(seed, height=6, width=6):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, array=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(grey(0) if array is None else array)
    image.save(path, **options)
    return path


def classes(root, names, images=2, make=grey):
    for number, name in enumerate(names):
        for image in range(images):
            save(root / name / f"{image}.png", make(100 * number + image))
    return root


def given(root, **parts):
    for part, names in parts.items():
        classes(root / part, names)
    return root


def error_of(*args, **options):
    with pytest.raises(InputError) as error:
        load_folder(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


NAMES = [f"class{number:02}" for number in range(10)]


# --- the parts ------------------------------------------------------------------------------------


def test_classes_are_split_by_the_seed(tmp_path):
    classes(tmp_path, NAMES)
    found = load_folder(tmp_path)
    assert found.origin == f"the folder {tmp_path}, split by class 6/2/2 with seed 0"
    parts = [part.names for part in found[:3]]
    assert [len(part) for part in parts] == [6, 2, 2]
    assert all(set(a).isdisjoint(b) for a, b in combinations(parts, 2))
    assert sorted(name for part in parts for name in part) == NAMES
    shuffled = list(NAMES)
    random.Random(0).shuffle(shuffled)
    assert parts == [sorted(shuffled[:6]), sorted(shuffled[6:8]), sorted(shuffled[8:])]
    again = load_folder(str(tmp_path))
    for one, other in zip(found[:3], again[:3]):
        assert one.names == other.names and torch.equal(one.inputs, other.inputs)
    assert load_folder(tmp_path, seed=1).train.names != parts[0]
    assert load_folder(tmp_path, seed=1).origin.endswith("with seed 1")


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (10, (0.5, 0.3, 0.2), [5, 3, 2]),
        (10, [0.1, 0.1, 0.8], [1, 1, 8]),
        (5, (0.6, 0.2, 0.2), [3, 1, 1]),
        (4, (0.6, 0.2, 0.2), [2, 1, 1]),
        (3, (1 / 3, 1 / 3, 1 / 3), [1, 1, 1]),
    ],
)
def test_the_shares_say_how_many(tmp_path, count, shares, expected):
    classes(tmp_path, NAMES[:count])
    assert [len(part) for part in load_folder(tmp_path, shares=shares)[:3]] == expected


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_directories_that_say_the_split_are_used(tmp_path, validation):
    given(tmp_path, **{"train": ["b", "a", "c"], validation: ["d"], "test": ["f", "e"]})
    found = load_folder(tmp_path, seed=3)
    assert [part.names for part in found[:3]] == [["a", "b", "c"], ["d"], ["e", "f"]]
    assert found.origin == f"the folder {tmp_path}, split by its directories train, {validation}, test"


def test_a_class_in_two_directories_is_mentioned(tmp_path):
    given(tmp_path, train=["a", "b", "c"], val=["d"], test=["b", "a"])
    found = load_folder(tmp_path)
    assert found.test.names == ["a", "b"]
    expected = "split by its directories train, val, test, which share 2 classes (a …)"
    assert found.origin == f"the folder {tmp_path}, {expected}"


def test_a_class_may_be_called_train(tmp_path):
    classes(tmp_path, ["train", "bus", "car", "plane", "test"])
    found = load_folder(tmp_path)
    assert sorted(name for part in found[:3] for name in part.names) == [
        "bus",
        "car",
        "plane",
        "test",
        "train",
    ]


def test_hidden_directories_are_no_classes(tmp_path):
    classes(tmp_path, [*NAMES[:5], ".cache"])
    assert sum(len(part) for part in load_folder(tmp_path)[:3]) == 5
    given(tmp_path / "parts", train=["a"], val=["b"], test=["c", ".d"])
    classes(tmp_path / "parts", [".git"])
    assert load_folder(tmp_path / "parts").test.names == ["c"]


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    classes(tmp_path / "things", NAMES)
    assert len(load_folder("~/things").train) == 6


# --- the images -----------------------------------------------------------------------------------


def test_grey_and_colour_images_and_how_they_are_drawn(tmp_path):
    classes(tmp_path, NAMES[:5], images=3, make=rgb)
    for colour, mode, channels in (("grey", "L", 1), ("rgb", "RGB", 3)):
        found = load_folder(tmp_path, colour=colour)
        for part in found[:3]:
            assert part.inputs.dtype == torch.uint8
            assert part.inputs.shape == (3 * len(part), channels, 6, 6)
            assert part.inputs.is_contiguous()
            assert part.counts.tolist() == [3] * len(part)
            rows = []
            for name in part.names:
                for image in range(3):
                    array = np.asarray(Image.open(tmp_path / name / f"{image}.png").convert(mode))
                    rows.append(array[None] if channels == 1 else array.transpose(2, 0, 1))
            assert np.array_equal(part.inputs, np.stack(rows))
            drawn = part.take(torch.arange(len(rows)))
            torch.testing.assert_close(drawn, torch.from_numpy(np.stack(rows) / 127.5 - 1).float())


def test_images_are_resized_to_height_and_width(tmp_path):
    classes(tmp_path, NAMES[:5])
    large = rgb(7, 12, 30)
    save(tmp_path / NAMES[0] / "large.jpg", large)
    for size in ((4, 9), [4, 9]):
        found = load_folder(tmp_path, size=size, colour="rgb")
        assert found.train.inputs.shape[1:] == (3, 4, 9)
    part = next(part for part in found[:3] if NAMES[0] in part.names)
    image = Image.open(tmp_path / NAMES[0] / "large.jpg").resize((9, 4), Image.Resampling.LANCZOS)
    assert np.array_equal(part.select([NAMES[0]]).inputs[2], np.asarray(image).transpose(2, 0, 1))


def one_image(tmp_path, name, write, **options):
    """The image that `write(path)` makes, as it is loaded."""
    classes(tmp_path, NAMES[:5], images=1)
    folder = tmp_path / NAMES[0]
    (folder / "0.png").unlink()
    write(folder / name)
    found = load_folder(tmp_path, **options)
    part = next(part for part in found[:3] if NAMES[0] in part.names)
    return part.select([NAMES[0]]).inputs[0]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".gif", ".tif", ".ppm", ".PNG", ".webp"])
def test_lossless_formats_of_every_kind(tmp_path, suffix):
    options = {"lossless": True} if suffix == ".webp" else {}
    image = one_image(tmp_path, f"a{suffix}", lambda path: save(path, grey(1), **options))
    assert np.array_equal(image[0], grey(1))


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_modes_of_every_kind(tmp_path, mode):
    black = Image.new("RGB", (6, 6)).convert(mode)
    for colour, channels in (("grey", 1), ("rgb", 3)):
        suffix = "tif" if mode == "CMYK" else "png"
        image = one_image(tmp_path, f"a.{suffix}", black.save, colour=colour)
        assert image.shape == (channels, 6, 6)
        assert image.max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image = Image.new("RGBA", (6, 6), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    if mode == "LA":
        image = image.convert("LA")
    elif mode == "P":
        image = Image.new("P", (6, 6), 1)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((0, 0), 0)
        image.info["transparency"] = b"\xff\x00"
    found = one_image(tmp_path, "a.png", image.save)
    expected = torch.full((6, 6), 255, dtype=torch.uint8)
    expected[0, 0] = 0
    assert torch.equal(found[0], expected)


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    image = one_image(tmp_path, "a.png", lambda path: save(path, grey(1), exif=exif))
    assert np.array_equal(image[0], np.rot90(grey(1), -1))


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.fromarray(grey(number)) for number in (1, 2)]
    image = one_image(tmp_path, "a.gif", lambda p: frames[0].save(p, save_all=True, append_images=frames[1:]))
    assert np.array_equal(image[0], grey(1))


def test_other_files_are_passed_over_and_counted(tmp_path):
    classes(tmp_path, NAMES[:5])
    expected = load_folder(tmp_path)
    (tmp_path / "README.md").write_text("beside the classes")
    (tmp_path / NAMES[0] / ".DS_Store").write_text("hidden")
    (tmp_path / NAMES[0] / ".hidden.png").write_text("hidden")
    found = load_folder(tmp_path)
    assert found.origin == expected.origin
    (tmp_path / NAMES[0] / "Thumbs.db").write_text("")
    found = load_folder(tmp_path)
    assert found.origin == f"{expected.origin}; passed over 1 file of other kinds"
    (tmp_path / NAMES[1] / "notes.txt").write_text("")
    (tmp_path / NAMES[1] / "paper.pdf").write_text("Pillow writes them, but reads none")
    found = load_folder(tmp_path)
    assert found.origin == f"{expected.origin}; passed over 3 files of other kinds"
    for one, other in zip(found[:3], expected[:3]):
        assert one.names == other.names and torch.equal(one.inputs, other.inputs)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "gray"}, "colour must be 'grey' or 'rgb', got 'gray'"),
        ({"size": 28}, "size must be (height, width) or None, got 28"),
        ({"size": (28, 28, 3)}, "size must be (height, width) or None, got (28, 28, 3)"),
        ({"size": (28, 0)}, "each side of size must be a whole number of 1 or more, got 0"),
        ({"shares": 0.5}, "shares must be three numbers, for train, validation and test, got 0.5"),
        (
            {"shares": (0.5, 0.5)},
            "shares must be three numbers, for train, validation and test, got (0.5, 0.5)",
        ),
        ({"shares": (0.5, 0.5, 0)}, "each of shares must be a positive finite number, got 0"),
        ({"shares": (0.5, 0.5, 0.5)}, "shares must add up to 1, got (0.5, 0.5, 0.5), which is 1.5"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"seed": True}, "seed must be a whole number, got True"),
    ],
)
def test_an_option_of_no_meaning_is_an_error(tmp_path, options, message):
    classes(tmp_path, NAMES)
    assert error_of(tmp_path, **options) == message


def test_a_folder_that_is_not_there_or_has_no_classes_is_named(tmp_path):
    expected = "expected a folder of images"
    assert error_of(tmp_path / "no") == f"{tmp_path / 'no'}: No such file or directory, {expected}"
    file = save(tmp_path / "images" / "a.png")
    assert error_of(file) == f"{file}: Not a directory, {expected}"
    message = "found no directories, expected one per class with its images in it"
    assert error_of(tmp_path / "images") == f"{tmp_path / 'images'}: {message}"


def test_a_class_without_images_is_named(tmp_path):
    classes(tmp_path, NAMES[:5])
    empty = tmp_path / "empty"
    empty.mkdir()
    end = "expected one or more of a class; add some, or remove the directory"
    assert error_of(tmp_path) == f"{empty}: found no image among 0 files, {end}"
    (empty / "notes.txt").write_text("")
    (empty / ".a.png").write_text("")
    assert error_of(tmp_path) == f"{empty}: found no image among 1 file, {end}"


def test_a_directory_in_a_class_is_named(tmp_path):
    classes(tmp_path, NAMES[:5])
    save(tmp_path / NAMES[2] / "more" / "a.png")
    message = f"{tmp_path / NAMES[2]}: found the directory more in a class, expected images only; "
    assert error_of(tmp_path).startswith(message)


def test_a_part_without_classes_is_named(tmp_path):
    given(tmp_path, train=["a"], val=["b"])
    (tmp_path / "test").mkdir()
    message = f"{tmp_path}: found no class in its directory for test, expected one per class"
    assert error_of(tmp_path) == message


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train"], "train"),
        (["train", "val"], "train, val"),
        (["val", "test"], "test, val"),
        (["train", "valid", "val", "test"], "test, train, val, valid"),
        (["train", "val", "test", "cat"], "cat, test, train, val"),
        (["train", "val", "test", *NAMES], "class00, class01, class02, class03, class04 and 8 more"),
    ],
)
def test_directories_that_do_not_say_the_split_clearly_are_named(tmp_path, names, found):
    given(tmp_path, **{name: ["a"] for name in names})
    end = "expected train and test, and val if wanted, or one per class, which are then split by class"
    assert error_of(tmp_path) == f"{tmp_path}: found the directories {found}, {end}"


@pytest.mark.parametrize(
    ("count", "shares", "found"),
    [
        (1, (0.6, 0.2, 0.2), "1 class, which the shares (0.6, 0.2, 0.2) split 1/0/0"),
        (3, (0.6, 0.2, 0.2), "3 classes, which the shares (0.6, 0.2, 0.2) split 2/0/1"),
        (10, (0.98, 0.01, 0.01), "10 classes, which the shares (0.98, 0.01, 0.01) split 10/0/0"),
    ],
)
def test_a_split_that_leaves_a_part_empty_is_an_error(tmp_path, count, shares, found):
    classes(tmp_path, NAMES[:count])
    end = "into train/validation/test; expected some in each: give more classes or other shares"
    assert error_of(tmp_path, shares=shares) == f"{tmp_path}: found {found} {end}"


def png_bytes():
    file = io.BytesIO()
    Image.fromarray(grey(0, 60, 60)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", png_bytes()[:-200], b"no image at all"])
def test_an_unreadable_image_is_named(tmp_path, data):
    classes(tmp_path, NAMES[:5])
    path = tmp_path / NAMES[3] / "1.png"
    path.write_bytes(data)
    error = error_of(tmp_path)
    assert error.startswith(f"{path} cannot be read as an image (")
    assert error.endswith("); mend or remove it")


def test_an_image_that_is_not_there_is_named(tmp_path):
    classes(tmp_path, NAMES[:5])
    path = tmp_path / NAMES[3] / "link.png"
    path.symlink_to(tmp_path / "nowhere.png")
    reason = "No such file or directory"
    assert error_of(tmp_path) == f"{path} cannot be read as an image ({reason}); mend or remove it"


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint16, "I;16"), (np.float32, "F")])
def test_an_image_of_more_than_8_bits_is_named(tmp_path, dtype, mode):
    classes(tmp_path, NAMES[:5])
    path = save(tmp_path / NAMES[3] / "wide.tif", (300 * np.ones((6, 6))).astype(dtype))
    assert error_of(tmp_path) == f"{path}: found pixels of mode {mode}, expected 8 bits a channel; convert it"


def test_images_of_two_sizes_need_a_size(tmp_path):
    given(tmp_path, train=["a"], val=["b"], test=["c"])
    path = save(tmp_path / "test" / "c" / "1.png", grey(0, 6, 9))
    assert error_of(tmp_path) == (
        f"{path} is 6 high and 9 wide, but {tmp_path / 'train' / 'a' / '0.png'} is 6 high and 6 wide; "
        "give the size=(height, width) to resize to"
    )
    assert load_folder(tmp_path, size=(6, 6)).test.inputs.shape == (2, 1, 6, 6)


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    classes(tmp_path, NAMES)
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert error_of(tmp_path) == 'no Pillow, which reads images; pip install "fomaml[images]"'


def test_names_that_are_no_text_or_break_lines_are_escaped(tmp_path):
    for name in (b"a\nb", b"a\xffb", b"c"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        Image.new("L", (4, 4)).save(os.path.join(os.fsdecode(folder), "0.png"))
    found = load_folder(tmp_path, shares=(0.34, 0.33, 0.33))
    names = [*found.train.names, *found.validation.names, *found.test.names]
    assert sorted(names) == sorted([r"a\nb", r"a\udcffb", "c"])
    "".join([*names, found.origin]).encode()
