"""The package as it is installed: its types, and its command by the package's name."""

import subprocess
import sys
from pathlib import Path

import pytest

import fomaml

ROOT = Path(fomaml.__file__).parent


def test_the_package_says_that_it_has_types():
    assert (ROOT / "py.typed").read_bytes() == b""


@pytest.mark.parametrize(
    ("argument", "said"), [("--help", "usage: fomaml "), ("presets", "fomaml train --preset NAME")]
)
def test_the_package_is_a_command(argument, said):
    """The same as `fomaml`, by an interpreter whose scripts are not on the path."""
    command = [sys.executable, "-m", "fomaml", argument]
    found = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT.parent)})
    assert (found.returncode, found.stderr) == (0, "") and said in found.stdout
