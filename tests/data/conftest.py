"""Nothing in this folder reaches the network: caches are new folders, servers are on this machine."""

import http.server
import logging
import threading
from functools import partial

import pytest

import omniglot_files
from fomaml.data import download, omniglot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache is a new folder, and neither a real server nor a proxy is ever asked."""
    from torchvision import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(datasets.Omniglot, "download_url_prefix", "http://127.0.0.1:9")
    return tmp_path / "cache" / "fomaml"


@pytest.fixture
def serve(monkeypatch):
    """A function that serves a folder on this machine: (URL, the paths that are asked for, a list that grows).

    It answers, however busy the machine is.
    """
    monkeypatch.setattr(download, "SECONDS", 600.0)
    servers = []

    def start(folder):
        asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                asked.append(self.path)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def tiny(monkeypatch):
    """The loader expects an Omniglot of the size of omniglot_files."""
    counts = {half: len(names) for half, names in omniglot_files.NAMES.items()}
    monkeypatch.setattr(omniglot, "CHARACTERS", counts)
    monkeypatch.setattr(omniglot, "DRAWINGS", 3)
    monkeypatch.setattr(omniglot, "SIDE", omniglot_files.SIDE)
    monkeypatch.setattr(omniglot, "MAML", (5, 2))


@pytest.fixture
def root(tmp_path):
    """A folder with both archives of the tiny Omniglot."""
    return omniglot_files.write(tmp_path / "data")


@pytest.fixture
def said(caplog):
    """What the library has logged since it was last asked, from information on: a list of (level, line)."""
    caplog.set_level(logging.INFO, "fomaml")

    def lines():
        found = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return found

    return lines
