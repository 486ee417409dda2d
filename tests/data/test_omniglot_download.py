"""Omniglot's download through torchvision, from a server on this machine."""

import hashlib
import socket
import sys
import time

import pytest

from fomaml.data import download
from fomaml.data.omniglot import load_omniglot
from omniglot_files import ARCHIVES, BACKGROUND, EVALUATION, assert_same, error_of, write

pytestmark = pytest.mark.usefixtures("cache", "tiny")

GIVE = f"give the folder that holds {BACKGROUND}.zip and {EVALUATION}.zip"


@pytest.fixture
def server(tmp_path, serve, monkeypatch):
    """A server on this machine that has the small archives, whose md5 torchvision is told."""
    from torchvision import datasets

    folder = write(tmp_path / "server")
    url, asked = serve(folder)
    monkeypatch.setattr(datasets.Omniglot, "download_url_prefix", url)
    md5 = {half: hashlib.md5(data).hexdigest() for half, data in ARCHIVES.items()}
    monkeypatch.setattr(datasets.Omniglot, "zips_md5", md5)
    return folder, asked


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


def test_without_a_network_the_error_comes_fast(cache, monkeypatch):
    monkeypatch.setattr(download, "SECONDS", 600.0)
    start = time.perf_counter()
    error = error_of()
    assert time.perf_counter() - start < download.SECONDS  # no timeout was waited for
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
