"""Input that means harm: what a tiny run leaves, and files of data, changed at random; and what must become of them.

A case is a kind of file and a random number generator. Its outcome is "clean", "refused" (one line, status 2), or a
fault in words. `tests/test_hostile.py` runs some in the default suite, `runs/fuzz.py` thousands with limits.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from fomaml.app import session
from fomaml.app.cli import main
from fomaml.app.rundir import load_settings
from fomaml.backbones import read_weights
from fomaml.data import omniglot
from fomaml.data.arrays import Arrays
from fomaml.data.images import Decoder
from fomaml.data.mnist import FILES, load_mnist
from fomaml.errors import InputError
from fomaml.files import load_tensors
from spoiling import WORDS, spoiled, spoiled_json, spoiled_lines, spoiled_tensors, spoiled_text, spoiled_zip

QUICK = (
    "--image-size 16 16 --channels 4 --ways 2 --shots 1 --query-shots 1 --inner-steps 1 --test-steps 0 1 "
    "--meta-batch-size 2 --iterations 4 --test-tasks 2 --validation-tasks 2 --shares 0.5 0.25 0.25 --no-baselines"
)
TINY = QUICK.split()  # fmt: skip
TABLE = ["--task", "task", "--target", "y"]
# --- what is changed ------------------------------------------------------------------------------


def write(base: Path) -> None:
    """A finished run, one that was stopped with its state, an adapted model, and files of data of each kind."""
    numbers = np.random.default_rng(0)
    for name in range(8):
        folder = base / "data" / f"class{name}"
        folder.mkdir(parents=True)
        for image in range(4):
            pixels = numbers.integers(0, 30, (16, 16)) + 28 * name
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{image}.png")
    source = f"folder:{base / 'data'}"
    quietly(["train", source, *TINY, "--algorithm", "zero-head", "--out", str(base / "run")])
    quietly(["calibrate", str(base / "run"), "--tasks", "4"])
    quietly(["adapt", str(base / "run"), "--support", str(base / "data"), "--out", str(base / "adapted")])
    real = session.train
    session.train = stopping(real)  # type: ignore[assignment]
    try:
        quietly(["train", source, *TINY, "--checkpoint-every", "1", "--out", str(base / "stopped")])
    finally:
        session.train = real
    _files(base, numbers)
    tensors = load_tensors(base / "run" / "weights.safetensors")[0]
    save_file(tensors, base / "files" / "w.safetensors")  # as other libraries write it, without a digest


def stopping(real):
    """The session's `train`, which is stopped, as by Ctrl-C, before it is at its end."""

    def train(*arguments, **options):
        for record in real(*arguments, **options):
            yield record
            if record.iteration == 2:
                raise KeyboardInterrupt

    return train


def _files(base: Path, numbers: np.random.Generator) -> None:
    files = base / "files"
    files.mkdir()
    shaded = Image.fromarray(numbers.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm", "tga", "pcx", "jp2"):
        with contextlib.suppress(KeyError, OSError):  # this Pillow writes no such format
            shaded.save(files / f"x.{suffix}")
    rows = [f"t{row % 5},{row * 0.5},{row % 3},{row % 2}" for row in range(40)]
    text = "\n".join(["task,x,z,y", *rows]) + "\n"
    (files / "x.csv").write_text(text)
    (files / "x.tsv").write_text(text.replace(",", "\t"))
    with contextlib.suppress(ImportError):
        import pandas as pd

        pd.read_csv(files / "x.csv").to_parquet(files / "x.parquet")
    arrays = {
        "x": numbers.normal(size=(40, 3)).astype(np.float32), "y": np.arange(40) % 2, "task": np.arange(40) // 8,
    }  # fmt: skip
    np.savez(files / "x.npz", **arrays)
    np.savez_compressed(files / "y.npz", **arrays)
    np.save(files / "x.npy", arrays["x"])
    raw = base / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, kind in ((part, kind) for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")):
        array = numbers.integers(0, 256, (20, 28, 28)) if kind == "images-idx3" else np.arange(20) % 10
        head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (raw / f"{part}-{kind}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
    (base / "omniglot").mkdir()
    for half, alphabet in (("images_background", "Greek"), ("images_evaluation", "Latin")):
        with zipfile.ZipFile(base / "omniglot" / f"{half}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(4):
                pixels = io.BytesIO()
                Image.fromarray(255 * numbers.integers(0, 2, (105, 105), dtype=np.uint8)).convert("1").save(
                    pixels, "png"
                )
                name = f"{half}/{alphabet}/character{number // 2 + 1:02}/{number:02}.png"
                archive.writestr(name, pixels.getvalue())


# --- cases ----------------------------------------------------------------------------------------


def of_run(name, change, *commands, run="run"):
    """A file of a run is changed, and one of the commands is run on it; "RUN" stands for the run."""

    def case(base, place, random):
        path = place / run / name
        shutil.copytree(base / run, place / run)
        path.write_bytes(change(path.read_bytes(), random))
        return [word.replace("RUN", str(place / run)) for word in random.choice(commands)]

    return case


def adapted(base, place, random):
    shutil.copytree(base / "adapted", place / "adapted")
    name, change = random.choice([("model.json", spoiled_json), ("weights.safetensors", spoiled_tensors)])
    path = place / "adapted" / name
    path.write_bytes(change(path.read_bytes(), random))
    return ["predict", str(place / "adapted"), str(base / "data" / "class0" / "0.png")]


def of_file(name, change, use):
    """A file of data is changed and read."""

    def case(base, place, random):
        path = place / name
        path.write_bytes(change((base / "files" / name).read_bytes(), random))
        return use(path)

    return case


def picture(base, place, random):
    name = random.choice(sorted(path.name for path in (base / "files").glob("x.*") if path.suffix in IMAGES))
    path = place / random.choice([name, "x.png"])
    path.write_bytes(spoiled((base / "files" / name).read_bytes(), random))
    return lambda: Decoder(random.choice([None, (8, 8)]), random.choice(["L", "RGB"])).image(path)


IMAGES = {".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm", ".tga", ".pcx", ".jp2"}


def idx(base, place, random):
    shutil.copytree(base / "mnist", place / "mnist")
    path = place / "mnist" / "MNIST" / "raw" / random.choice(FILES)
    data, packed = path.read_bytes(), random.randint(0, 2)
    if packed:
        path.unlink()
        data = spoiled(gzip.compress(data), random) if packed == 1 else gzip.compress(spoiled(data, random))
        path.with_name(f"{path.name}.gz").write_bytes(data)
    else:
        path.write_bytes(spoiled(data, random))
    return lambda: load_mnist(place / "mnist")


def drawings(base, place, random):
    shutil.copytree(base / "omniglot", place / "omniglot")
    path = place / "omniglot" / "images_background.zip"
    path.write_bytes(spoiled_zip(path.read_bytes(), random))

    def use():
        kept = omniglot.CHARACTERS, omniglot.DRAWINGS, omniglot.MAML
        omniglot.CHARACTERS, omniglot.DRAWINGS = dict.fromkeys(kept[0], 2), 2
        omniglot.MAML = (1, 1)
        try:
            omniglot.load_omniglot(place / "omniglot", cache=place / "cache", allow_download=False)
        finally:
            omniglot.CHARACTERS, omniglot.DRAWINGS, omniglot.MAML = kept

    return use


def names(base, place, random):
    """Folders and files with names that are no text, or of several lines."""
    folder = place / "data"
    shutil.copytree(base / "data", folder)
    odd = [b"a\nb", b"a\xffb", b"a\tb\r", b"\xe2\x80\xa8", b"a\x1b[31mb", b"x" * 250, b"%s", b"'\"<&>", b"-x"]
    for own in sorted(folder.iterdir())[: random.randint(1, 8)]:
        os.rename(own, os.path.join(os.fsencode(folder), random.choice(odd) + own.name.encode()[-1:]))
    own = random.choice(sorted(folder.iterdir()))
    os.rename(own / "0.png", os.path.join(os.fsencode(own), random.choice(odd)[:200] + b".png"))
    return random.choice([
        ["data", f"folder:{folder}", "--image-size", "16", "16", "--out", str(place / "looked")],
        ["train", f"folder:{folder}", *TINY, "--out", str(place / "out")],
        ["predict", str(base / "adapted"), str(own)],
        ["predict", str(base / "adapted"), str(own), "--out", str(place / "made.csv")],
        ["adapt", str(base / "run"), "--support", str(folder), "--out", str(place / "again")],
        ["show", str(own)],
    ])  # fmt: skip


def command(base, place, random):
    """A command line with options and values of all sorts; of some every word but one is right."""
    options, values = sorted(OPTIONS), [*WORDS, *["1", "2", "3", "0.5", "none"] * 4]
    kind = random.randint(0, 4)
    if kind < 2:
        own = ["train", f"folder:{base / 'data'}", *TINY, *["--dry-run"] * kind, "--out", str(place / "out")]
        name, *right = random.choice(RIGHT)
        own += [name, *(random.choice(values) if random.randint(0, 2) == 0 else value for value in right)]
        return own
    if kind == 2:
        source = random.choice(["sinusoid", "mnist", "omniglot", f"folder:{base / 'data'}", *WORDS])
        own = ["train", source, "--dry-run"]
    elif kind == 3:
        name = random.choice(["evaluate", "show", "report", "calibrate", "data", "predict", "adapt"])
        own = [name, random.choice([str(base / "run"), *WORDS])]
    else:
        own = random.choices(WORDS, k=random.randint(0, 3))
    for _ in range(random.randint(0, 3)):
        own += [random.choice(options), *random.choices(values, k=random.randint(0, 2))]
    return own


RIGHT = (
    ("--inner-lr", "0.1"), ("--meta-lr", "0.01"), ("--seed", "3"), ("--iterations", "3"),
    ("--shares", "0.5", "0.25", "0.25"),
    ("--test-steps", "0", "2"), ("--algorithm", "reptile"), ("--model", "linear"), ("--channels", "2", "2", "2", "2"),
    ("--meta-batch-size", "1"), ("--validate-every", "2"), ("--clip", "1"), ("--jitter", "0.1"),
    ("--image-size", "16", "16"),
    ("--checkpoint-every", "1"), ("--statistics", "own"), ("--decode", "drawn"),
    ("--skip-small-classes",),
)  # fmt: skip


# those that start another program, reach for the network or take their time are not among them
OPTIONS = {
    "--ways", "--shots", "--iterations", "--inner-lr", "--inner-steps", "--meta-lr", "--meta-batch-size",
    "--seed", "--shares",
    "--image-size", "--channels", "--test-tasks", "--test-steps", "--query-shots", "--algorithm", "--model",
    "--device", "--dtype",
    "--task", "--target", "--window", "--window-x", "--validate-every", "--patience", "--split", "--resize",
    "--augment", "--kind",
    "--features", "--statistics", "--jitter", "--model-options", "--loss", "--metric", "--head",
    "--data-root", "--separator", "--x",
}  # fmt: skip

COMMANDS = (["show", "RUN"], ["evaluate", "RUN", "--tasks", "2"])
CASES = {
    "state.safetensors": of_run("state.safetensors", spoiled_tensors, ["train", "--resume", "RUN"], run="stopped"),
    "config.json of a stopped run": of_run("config.json", spoiled_json, ["train", "--resume", "RUN"], run="stopped"),
    "metrics.jsonl of a stopped run": of_run("metrics.jsonl", spoiled_lines, ["train", "--resume", "RUN"],
    run="stopped"),
    "config.json": of_run("config.json", spoiled_json, *COMMANDS),
    "weights.safetensors": of_run("weights.safetensors", spoiled_tensors, ["evaluate", "RUN", "--tasks", "2"]),
    "metrics.jsonl": of_run("metrics.jsonl", spoiled_lines, ["show", "RUN"]),
    "result.json": of_run("result.json", spoiled_json, ["show", "RUN"]),
    "a report": of_run(
        "result.json", spoiled_json, ["report", "RUN", "--out", "RUN/page"], ["show", "RUN", "--png", "RUN/page"]
    ),
    "calibration.json": of_run("calibration.json", spoiled_json, ["show", "RUN"], ["calibrate", "RUN",
    "--tasks", "2"]),
    "parts.json": of_run("parts.json", spoiled_json, *COMMANDS),
    "an adapted model": adapted,
    "weights of others": of_file("w.safetensors", spoiled_tensors, lambda path: lambda: read_weights(path)),
    "IDX": idx,
    "an archive of drawings": drawings,
    "an image": picture,
    "csv": of_file("x.csv", spoiled_text, lambda path: ["data", f"table:{path}", *TABLE]),
    "tsv": of_file("x.tsv", spoiled_text, lambda path: ["data", f"table:{path}", *TABLE]),
    "parquet": of_file("x.parquet", spoiled, lambda path: ["data", f"table:{path}", *TABLE]),
    "npz": of_file("x.npz", spoiled_zip, lambda path: ["data", f"arrays:{path}", "--task", "task", "--inputs",
    "x", "--target", "y"]),
    "packed npz": of_file("y.npz", spoiled_zip, lambda path: lambda: [*Arrays(path).values()]),
    "npy": of_file("x.npy", spoiled, lambda path: lambda: np.asarray(Arrays(path.parent)["x"]).sum()),
    "names of files": names,
    "a command line": command,
}  # fmt: skip


# --- outcomes -------------------------------------------------------------------------------------


def quietly(words) -> tuple[int, str]:
    """The status of a command, and what it said on standard error."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0
            return status, said.getvalue()
    return 0, said.getvalue()


def outcome(kind: str, base: Path, place: Path, random) -> str:
    """What became of a case: "clean", "refused", or a fault in words. place: an empty folder."""
    use = CASES[kind](base, place, random)
    shown = repr(use)[:500] if isinstance(use, list) else kind
    try:
        if isinstance(use, list):
            status, said = quietly(use)
            lines = [line for line in said.split("\n") if line.startswith("fomaml: error: ")]
            if status not in (0, 2) or "Traceback" in said:
                return f"{shown}: status {status}: {said[-300:]}"
            if status == 2 and (len(lines) != 1 or not said.endswith(f"{lines[0]}\n")):
                return f"{shown}: not one line: {said[-300:]!r}"
            found = "refused" if status else "clean"
        else:
            use()
            found = "clean"
    except InputError as error:
        if "\n" in str(error):
            return f"{shown}: not one line: {str(error)!r}"
        found = "refused"
    except Exception as error:
        trace, places = error.__traceback__, []
        while trace is not None:
            places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
            trace = trace.tb_next
        return f"{shown}: {type(error).__name__}: {str(error)[:200]} ({' '.join(places[-6:])})"
    for path in place.rglob(".*"):
        if re.fullmatch(r"\..+\.\d+", path.name):
            return f"{shown}: left {path.name}"
    for path in place.rglob("*"):
        if (
            path.is_file()
            and path.suffix in (".txt", ".csv", ".html")
            and not (base / "files" / path.name).exists()
        ):
            path.read_bytes().decode()
    if (place / "out" / "config.json").exists():
        load_settings(place / "out")
    return found
