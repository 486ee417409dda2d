"""Images that are decoded when they are drawn: the same bits as those that are kept, and files that go bad later."""

import numpy as np
import pytest
import torch
from PIL import Image

from fomaml.data import images
from fomaml.data.folder import load_folder, load_tasks
from fomaml.episodes import Episodes
from fomaml.errors import InputError
from fomaml.group_episodes import GroupEpisodes

CLASSES = [f"class{number}" for number in range(5)]


def drawing(seed, height=6, width=6):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def fill(root, height=6, width=6, number=3):
    """Classes of several formats and modes."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for image in range(number):
            made = drawing(10 * label + image, height, width)
            made = made.convert(("RGB", "L", "P")[image % 3])
            made.save(root / name / f"{image}.{('png', 'bmp', 'gif')[label % 3]}")
    return root


@pytest.fixture
def opened(monkeypatch):
    """The files that are decoded from now on."""
    found, decode = [], images.Decoder.image
    monkeypatch.setattr(
        images.Decoder, "image", lambda self, path: (found.append(path.name), decode(self, path))[1]
    )
    return found


@pytest.mark.parametrize("size", [None, (4, 9)])
@pytest.mark.parametrize("colour", ["grey", "rgb"])
def test_the_same_bits_as_decoded_at_once(tmp_path, size, colour, opened):
    fill(tmp_path, 6, 8)
    kept = load_folder(tmp_path, size=size, colour=colour, in_memory=True)
    opened.clear()
    drawn = load_folder(tmp_path, size=size, colour=colour, in_memory=False)
    assert opened == [] and drawn.origin == kept.origin
    for mine, theirs in zip(drawn[:3], kept[:3]):
        assert mine.names == theirs.names and mine.inputs.shape == theirs.inputs.shape
        assert torch.equal(mine.inputs[:], theirs.inputs)
    options = {"ways": 3, "shots": 1, "query_shots": 2, "seed": 4, "jitter": 0.1}
    opened.clear()
    batches = [Episodes(found.train, **options).batch(3, 2) for found in (drawn, kept)]
    assert 9 <= len(opened) <= 18  # each once, of either task, and none of those kept
    for mine, theirs in zip(*batches):
        assert torch.equal(mine.inputs, theirs.inputs) and torch.equal(mine.targets, theirs.targets)


def test_tasks_have_the_same_bits_too(tmp_path, opened):
    for task in ("b", "a"):
        fill(tmp_path / task)
    kept = load_tasks(tmp_path, colour="rgb", in_memory=True)
    opened.clear()
    drawn = load_tasks(tmp_path, colour="rgb", in_memory=False)
    assert opened == []
    batches = [GroupEpisodes(found, shots=1, query_shots=2, seed=1).batch(0, 1) for found in (drawn, kept)]
    assert len(opened) == 15
    for mine, theirs in zip(*batches):
        assert torch.equal(mine.inputs, theirs.inputs) and torch.equal(mine.targets, theirs.targets)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_sizes_are_those_of_turned_photographs(tmp_path, orientation, suffix):
    """All of them stand upright once they are turned, as the header of each says."""
    fill(tmp_path, 8, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    own = drawing(1, *((6, 8) if orientation in (6, 8) else (8, 6)))
    own.save(tmp_path / CLASSES[2] / f"turned.{suffix}", exif=exif)
    kept, drawn = (load_folder(tmp_path, in_memory=in_memory)[:3] for in_memory in (True, False))
    for mine, theirs in zip(drawn, kept):
        assert torch.equal(mine.inputs[:], theirs.inputs)


def test_what_takes_too_much_is_decoded_when_it_is_drawn(tmp_path, monkeypatch, said):
    fill(tmp_path)  # 15 images of 36 bytes
    monkeypatch.setattr(images, "IN_MEMORY", 15 * 36)
    assert isinstance(load_folder(tmp_path).train.inputs, torch.Tensor) and said() == []
    assert not isinstance(load_folder(tmp_path, colour="rgb").train.inputs, torch.Tensor)
    [(level, line)] = said()
    assert level == "INFO" and "\n" not in line
    assert line.startswith(f"{tmp_path}: 15 images would take ")
    assert line.endswith(": they are decoded whenever they are drawn")
    assert isinstance(load_folder(tmp_path, colour="rgb", in_memory=True).train.inputs, torch.Tensor)
    assert said() == []


def gone(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:60])


def other_size(path):
    drawing(0, 6, 9).save(path, "png")


def wide(path):
    Image.fromarray(np.full((6, 6), 300, np.uint16)).save(path, "png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (gone, "cannot be read as an image (No such file or directory); mend or remove it"),
        (cut, "cannot be read as an image ("),
        (other_size, "is 6 high and 9 wide, but "),
        (wide, "found pixels of mode I;16, expected 8 bits a channel; convert it"),
    ],
)
def test_a_file_that_goes_bad_later_is_named(tmp_path, spoil, message):
    fill(tmp_path)
    found = load_folder(tmp_path, in_memory=False)
    name = found.train.names[-1]
    [path] = (tmp_path / name).glob("1.*")
    spoil(path)
    found.train.take(torch.arange(3))
    with pytest.raises(InputError) as error:
        found.train.take(found.train.offsets[-1] + torch.arange(3))
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [None, (6, 6)])
@pytest.mark.parametrize("spoil", [gone, other_size, wide])
def test_headers_are_looked_at_before(tmp_path, spoil, size):
    """As far as a header tells, what is wrong is said at once, in the words of the other way."""
    fill(tmp_path)
    path = tmp_path / CLASSES[3] / "1.png"
    spoil(path)
    if spoil is gone:
        path.symlink_to(tmp_path / "nowhere.png")
    answers = []
    for in_memory in (True, False):
        try:
            load_folder(tmp_path, size=size, in_memory=in_memory)
            answers.append(None)
        except InputError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]
    assert (answers[0] is None) == (spoil is other_size and size is not None)


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(InputError, match="found no directories, expected one per task"):
        load_tasks(tmp_path)
