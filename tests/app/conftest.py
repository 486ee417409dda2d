"""What most tests of the application train on: a small Omniglot, and folders of images."""

import numpy as np
import pytest
from PIL import Image

import characters
from fomaml.app.cli import main


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder with its archives; nothing but decoded images is written to it."""
    return characters.write(tmp_path_factory.mktemp("omniglot"))


@pytest.fixture
def small(monkeypatch):
    """The loader expects an Omniglot of this size."""
    characters.shrink(monkeypatch)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Folders of images: `even` of ten classes, `uneven`, whose last four have one image, `parts`, which share one."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)

    def write(folder, count):
        folder.mkdir(parents=True)
        shape = random.integers(0, 2, (4, 4)) * 200
        for image in range(count):
            noise = random.integers(0, 50, (16, 16))
            pixels = (np.kron(shape, np.ones((4, 4))) + noise).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}.png")

    for number in range(10):
        write(root / "even" / f"class{number}", 6)
        write(root / "uneven" / f"class{number}", 6 if number < 6 else 1)
    for part, names in {"train": "abc", "test": "cd"}.items():
        for name in names:
            write(root / "parts" / part / name, 6)
    return root


@pytest.fixture(scope="session")
def strangers(tmp_path_factory):
    """The files of `served.py`."""
    pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
    pytest.importorskip("timm", reason="some networks are timm's, of the extra backbones")
    import served

    folder = tmp_path_factory.mktemp("served")
    served.write(folder)
    return folder


@pytest.fixture(scope="session")
def run_of(strangers, tmp_path_factory):
    """Name → the directory of its run, one of `served.SOURCES`, trained when it is first asked for."""
    import served

    made = {}

    def of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / name.replace(" ", "-")
            text = served.SOURCES[name].replace("DATA", str(strangers))
            main(["train", *text.split(), "--out", str(made[name])])
        return made[name]

    return of
