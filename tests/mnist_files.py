"""A tiny MNIST of random images in torchvision's files."""

import gzip
import sys
from functools import partial

import numpy as np
import pytest
import torch

from fomaml.data import mnist

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = mnist.FILES


def idx(array) -> bytes:
    """The IDX file of an array of bytes (specified at the foot of LeCun's MNIST page)."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def digits(examples, seed):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (examples, 28, 28)), random.permutation(examples) % 10


TRAIN, TEST = digits(30, 0), digits(20, 1)
CONTENT = dict(zip(mnist.FILES, map(idx, (*TRAIN, *TEST))))


def write(root, content=CONTENT, zipped=False):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        path = raw / f"{name}.gz" if zipped else raw / name
        path.write_bytes(gzip.compress(data) if zipped else data)
    return raw


def assert_is_the_written_mnist(found):
    assert found.name == "MNIST"
    for source, (images, labels) in ((found.train, TRAIN), (found.test, TEST)):
        assert source.names == list("0123456789")
        assert source.inputs.dtype == torch.uint8
        assert source.inputs.shape == (len(images), 1, 28, 28)
        order = np.argsort(labels, kind="stable")
        assert source.labels().tolist() == labels[order].tolist()
        assert np.array_equal(source.inputs[:, 0].numpy(), images[order])
        expected = torch.tensor(images[order] / 127.5 - 1, dtype=torch.float32)
        torch.testing.assert_close(source.take(torch.arange(len(images)))[:, 0], expected)


def forbid(monkeypatch, *names):
    for name in names:
        call = partial(pytest.fail, f"{name} was called")
        monkeypatch.setattr(mnist, name, lambda *_, call=call: call())


def without(monkeypatch, *packages):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)  # makes `import package` fail
        monkeypatch.setitem(sys.modules, f"{package}.data.mnist", None)
