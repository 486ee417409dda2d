import numpy as np
import pytest
from PIL import Image

from fomaml.data.folder import has_tasks, load_tasks
from fomaml.errors import InputError


def grey(seed):
    return np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)


def save(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey(0) if array is None else array).save(path)


def test_a_folder_of_tasks(tmp_path):
    for task in ("b", "a"):
        for name in ("x", "y"):
            for image in range(2):
                save(tmp_path / task / name / f"{image}.png", grey(ord(task) + ord(name) + image))
    (tmp_path / "a" / "x" / "notes.txt").write_text("no image")
    assert has_tasks(tmp_path) and not has_tasks(tmp_path / "a") and not has_tasks(tmp_path / "none")
    found = load_tasks(tmp_path)
    assert found.names == ["a", "b"] and found.classes == ["x", "y"] and found.counts.tolist() == [4, 4]
    assert found.left_out == "1 file of other kinds"
    for task, name in enumerate(found.names):
        for label, positions in enumerate(found.positions(task)):
            inputs, targets = found.take(positions)
            assert targets.tolist() == [label, label]
            for image, own in enumerate(inputs):
                pixels = grey(ord(name) + ord(found.classes[label]) + image)
                np.testing.assert_allclose(own[0], pixels / 127.5 - 1, atol=1e-6)


def test_parts_are_no_tasks(tmp_path):
    for part, name in (("train", "x"), ("train", "y"), ("test", "z")):
        save(tmp_path / part / name / "0.png")
    assert not has_tasks(tmp_path)


def test_a_task_without_classes_is_refused(tmp_path):
    save(tmp_path / "a" / "x" / "0.png")
    save(tmp_path / "b" / "0.png")
    with pytest.raises(
        InputError, match="found no directories, expected one per class, as in the other tasks"
    ):
        load_tasks(tmp_path)
