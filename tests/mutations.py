"""Files and words that mean harm, by hypothesis: valid ones that are changed, and what a command makes of them."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

import mnist_files
from fomaml.app.cli import main

RUN = "sinusoid --iterations 4 --checkpoint-every 1 --meta-batch-size 2 --test-tasks 3 --test-steps 0 1 --no-baselines"
HOSTILE = [
    None, True, -1, 0, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x", "\x00", "\ud800", "a\nb", "../../x",
    "long" * 5000, [], {}, [[[]]], {"a": {"b": 1}}, [None], "1e400", "folder:/dev/zero", "mnist",
]  # fmt: skip
# What is done with a file of a run.
USES = {
    "config.json": ("evaluate RUN --tasks 2", "show RUN", "report RUN"),
    "metrics.jsonl": ("show RUN",),
    "result.json": ("show RUN",),
    "result.txt": ("show RUN",),
    "weights.safetensors": ("evaluate RUN --tasks 2",),
}
OF_A_KILLED_ONE = ("config.json", "metrics.jsonl", "state.safetensors", "before.safetensors")
DATA = {
    "table.csv": "data table:FILE --task m --target y",
    "table.tsv": "data table:FILE --task m --target y",
    "arrays.npz": "data arrays:FILE --task m --inputs x --target y",
    "pictures/c1/1.png": "data folder:ROOT/pictures",
    "pictures/c2/2.bmp": "data folder:ROOT/pictures",
    "pictures/c3/3.jpg": "data folder:ROOT/pictures",
    "MNIST/raw/train-images-idx3-ubyte.gz": "data mnist --data-root ROOT",
    "MNIST/raw/t10k-labels-idx1-ubyte.gz": "data mnist --data-root ROOT",
}
WORDS = [
    "train",
    "evaluate",
    "show",
    "compare",
    "tune",
    "data",
    "report",
    "adapt",
    "predict",
    "export",
    "check",
]
OPTIONS = [
    "--shots", "--ways", "--iterations", "--inner-lr", "--meta-lr", "--meta-batch-size", "--test-tasks", "--test-steps",
    "--out", "--resume", "--model", "--channels", "--algorithm", "--engine", "--device", "--autocast", "--seed",
    "--seconds", "--clip", "--query-shots", "--image-size", "--data-root", "--tasks", "--support", "--loss", "--metric",
    "--validate-every", "--patience", "--checkpoint-seconds", "--on-nonfinite", "--sots", "--",
]  # fmt: skip
SOURCES = [
    "sinusoid",
    "mnist",
    "omniglot",
    "folder:x",
    "table:x.csv",
    "arrays:x.npz",
    "windows:x.npz",
    "nothing",
    "",
]
VALUES = [
    "0", "-1", "1", "nan", "inf", "1e400", "2147483648", "9" * 400, "x", "", "\udcff", "a\nb", "none", "1.5",
    "/dev/null", "/dev/zero", "a" * 300,
]  # fmt: skip


class Said(NamedTuple):
    status: int
    out: str
    error: str


def said(words: list[str]) -> Said:
    """What a command says, and its exit status."""
    out, error = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main(words)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
    return Said(status, out.getvalue(), error.getvalue())


def check_one_line(found: Said, told: object) -> None:
    """A clean result, or one line and the status 2."""
    assert found.status in (0, 2), (told, found)
    assert "Traceback" not in found.error, (told, found)
    if found.status == 2:
        lines = [line for line in found.error.splitlines() if line.startswith("fomaml: error: ")]
        assert len(lines) == 1 and found.error.endswith(f"{lines[0]}\n"), (told, found)


def check_clean(folder: Path) -> None:
    """Nothing half-written is left: no temporary files."""
    assert not [path for path in folder.rglob(".*") if path.is_file()], sorted(folder.rglob(".*"))


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes with a few flipped, cut, doubled or put in."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "double", "zero", "big"]))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
        elif kind == "double":
            data = data[:at] + data[at : at + 64] + data[at:]
        elif kind == "zero":
            data = data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
        else:
            data = data[:at] + b"\xff" * 8 + data[at + 8 :]
    return data


@st.composite
def changed_json(draw: st.DrawFn, data: bytes) -> bytes:
    """A JSON object with one value that is hostile, one that is missing or one too many; with its digest or without."""
    values = json.loads(data)
    place = values
    while True:
        key = draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        break
    kind = draw(st.sampled_from(["set", "remove", "add"]))
    if kind == "remove":
        del place[key]
    else:
        place[key if kind == "set" else "unknown"] = draw(st.sampled_from(HOSTILE))
    if draw(st.booleans()):
        values.pop("digest", None)
        if draw(st.booleans()):
            values["format"] = draw(st.sampled_from([0, 1]))
    return json.dumps(values).encode()


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Words of which some are options; with --dry-run where a training might come of them."""
    command = draw(st.sampled_from(WORDS))
    words = [command, draw(st.sampled_from(SOURCES))]
    for _ in range(draw(st.integers(0, 3))):
        words += [draw(st.sampled_from(OPTIONS)), draw(st.sampled_from(VALUES))]
    if command == "train":
        words.append("--dry-run")
    elif command in ("compare", "tune"):
        words += ["--iterations", "-1"]
    return words


def write_data(root: Path) -> None:
    """A valid file of each kind of data."""
    from PIL import Image

    random = np.random.default_rng(0)
    rows = [f"m{m},{random.normal():.4f},{random.normal():.4f}" for m in range(8) for _ in range(16)]
    (root / "table.csv").write_text("\n".join(["m,x,y", *rows]) + "\n")
    (root / "table.tsv").write_text("\n".join(["m,x,y", *rows]).replace(",", "\t") + "\n")
    named = {"m": np.repeat(np.arange(8), 16), "y": random.normal(size=128)}
    np.savez(root / "arrays.npz", x=random.normal(size=(128, 3)).astype(np.float32), **named)
    for number in range(6):
        folder = root / "pictures" / f"c{number}"
        folder.mkdir(parents=True)
        for each in range(12):
            suffix = {2: "bmp", 3: "jpg"}.get(number, "png")
            Image.fromarray(random.integers(0, 255, (8, 8), np.uint8)).save(folder / f"{each}.{suffix}")
    mnist_files.write(root, zipped=True)


class Bench:
    """A finished run, a killed one and data, and copies of them to spoil."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.run, self.killed, self.data = folder / "run", folder / "killed", folder / "data"
        self.data.mkdir()
        write_data(self.data)
        assert said(["train", *RUN.split(), "--out", str(self.run)]).status == 0
        self.known: dict[str, str] = {}

    def kill(self, patch) -> None:
        """Make the killed run, which has three of four iterations. patch: a monkeypatch."""
        from fomaml.app import session

        real = session.train

        def dying(*arguments, **options):
            for record in real(*arguments, **options):
                yield record
                if record.iteration == 3:
                    raise KeyboardInterrupt

        patch.setattr(session, "train", dying)
        assert said(["train", *RUN.split(), "--out", str(self.killed)]).status == 130

    def spoiled_run(self, name: str, data: bytes, use: str) -> None:
        """A command on a run, of which one file is another: the same is said as of the whole one, or one line."""
        own = self._copy(self.run)
        (own / name).write_bytes(data)
        found = said(use.replace("RUN", str(own)).split())
        check_one_line(found, (name, use))
        check_clean(own)
        if found.status == 0:
            assert found.out == self._expected(use, own), (name, use, found)

    def spoiled_killed_run(self, name: str, data: bytes) -> None:
        """A killed run, of which one file is another, ends as the whole one, or refuses to go on."""
        own = self._copy(self.killed)
        (own / name).write_bytes(data)
        found = said(["train", "--resume", str(own)])
        check_one_line(found, name)
        check_clean(own)
        if found.status == 0:
            for file in ("weights.safetensors", "result.txt"):
                assert (own / file).read_bytes() == (self.run / file).read_bytes(), (name, file, found)

    def spoiled_data(self, name: str, data: bytes) -> None:
        own = self._copy(self.data)
        (own / name).write_bytes(data)
        use = DATA[name].replace("FILE", str(own / name)).replace("ROOT", str(own))
        check_one_line(said([*use.split(), "--out", str(self.folder / "seen")]), name)
        shutil.rmtree(self.folder / "seen", ignore_errors=True)

    def _copy(self, folder: Path) -> Path:
        own = self.folder / "own"
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(folder, own)
        return own

    def _expected(self, use: str, own: Path) -> str:
        if use not in self.known:
            shutil.rmtree(own)
            shutil.copytree(self.run, own)
            self.known[use] = said(use.replace("RUN", str(own)).split()).out
        return self.known[use]
