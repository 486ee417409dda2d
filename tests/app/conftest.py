"""The small Omniglot that most tests of the application train on."""

import pytest

import characters


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder with its archives; nothing but decoded images is written to it."""
    return characters.write(tmp_path_factory.mktemp("omniglot"))


@pytest.fixture
def small(monkeypatch):
    """The loader expects an Omniglot of this size."""
    characters.shrink(monkeypatch)
