import numpy as np
import pytest

from fomaml.data.arrays import Arrays
from fomaml.errors import InputError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, inputs=np.eye(3), subject=np.array(["a", "b", "c"]), objects=np.array([{}], dtype=object))
    return path


def test_arrays_of_a_file(file):
    found = Arrays(str(file))
    assert list(found) == ["inputs", "subject", "objects"] and len(found) == 3
    assert (found["inputs"] == np.eye(3)).all() and found["subject"].tolist() == ["a", "b", "c"]


def test_arrays_of_a_folder_are_mapped(tmp_path):
    np.save(tmp_path / "x.npy", np.eye(3))
    (tmp_path / "readme.txt").write_text("no array")
    found = Arrays(tmp_path)
    assert list(found) == ["x"] and isinstance(found["x"], np.memmap)


def test_an_object_array_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    np.savez(tmp_path / "trap.npz", x=np.array([Trap()], dtype=object))
    np.save(tmp_path / "y.npy", np.array([Trap()], dtype=object))
    for found, key in ((Arrays(tmp_path / "trap.npz"), "x"), (Arrays(tmp_path), "y")):
        with pytest.raises(InputError, match=r"object array.*never unpickled"):
            found[key]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: Arrays(folder / "none.npz"), "no file .*none.npz"),
        (lambda folder: Arrays(folder / "data.npz")["subjects"], "no array 'subjects'; there are: subject, "),
        (lambda folder: Arrays(folder / "data.npz")["objects"], "object array"),
        (lambda folder: Arrays(folder / "text.npz"), "cannot be read as an .npz file"),
        (lambda folder: Arrays(folder / "empty.npz"), "cannot be read as an .npz file"),
        (lambda folder: Arrays(folder / "cut.npz"), "cannot be read as an .npz file"),
        (lambda folder: Arrays(folder / "alone.npy"), "one array without a name"),
        (lambda folder: Arrays(folder / "nothing"), "holds no arrays"),
    ],
)
def test_refused_in_one_line(make, text, file):
    folder = file.parent
    (folder / "text.npz").write_text("a,b\n1,2\n")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "cut.npz").write_bytes(file.read_bytes()[:-100])
    np.save(folder / "alone.npy", np.eye(3))
    (folder / "nothing").mkdir()
    with pytest.raises(InputError, match=text) as caught:
        make(folder)
    assert "\n" not in str(caught.value)
