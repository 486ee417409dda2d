"""What others have written: ordinary files alone are opened, and what they declare is looked at before it is read."""

import gzip
import os
import socket
import struct
import zipfile
import zlib

import numpy as np
import pytest

import mnist_files
from fomaml import regular
from fomaml.app.run_record import read_result
from fomaml.backbones import read_weights
from fomaml.data.arrays import Arrays
from fomaml.data.folder import load_folder
from fomaml.data.images import Decoder
from fomaml.data.mnist import load_mnist
from fomaml.data.table import read_table
from fomaml.errors import InputError
from fomaml.files import load_tensors
from fomaml.serve.pictures import Pictures

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def line_of(function, *arguments):
    """The one line with which something is refused."""
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


def endpoint(path):
    with socket.socket(socket.AF_UNIX) as own:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket has 108 bytes at most
        try:
            own.bind(path.name)
        finally:
            os.chdir(here)


def idx_file(path):
    raw = mnist_files.write(path.parent)
    if path.suffix:  # the pipe, or the device, in place of one file of it
        os.replace(path, raw / mnist_files.TRAIN_IMAGES)
    load_mnist(path.parent)


READERS = {
    "x.idx": idx_file,
    "x.npz": Arrays,
    "x.csv": read_table,
    "x.parquet": read_table,
    "x.png": lambda path: Decoder((8, 8), "L").image(path),
    "y.png": lambda path: Pictures(1, 8, 8).inputs([path]),
    "x.safetensors": load_tensors,
    "y.safetensors": read_weights,
    "result.json": lambda path: read_result(path.parent),
    "key.npy": lambda path: Arrays(path.parent)["key"],
}


@pytest.mark.parametrize("kind", [pipe, device, endpoint], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", READERS)
def test_only_ordinary_files_are_opened(tmp_path, name, kind):
    kind(tmp_path / name)
    told = line_of(READERS[name], tmp_path / name)
    assert {"pipe": "is a named pipe", "device": "is a device", "endpoint": "is a socket"}[
        kind.__name__
    ] in told


def test_a_folder_is_no_file(tmp_path):
    folder(tmp_path / "x")
    assert line_of(regular.read_bytes, tmp_path / "x").startswith(f"{tmp_path / 'x'} is a folder, expected")


def test_no_more_is_read_than_is_allowed(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert regular.read_bytes(path, 5) == b"12345"
    assert "more than 4 bytes" in line_of(regular.read_bytes, path, 4)
    os.truncate(path, regular.TEXT + 1)  # sparse
    assert f"more than {regular.TEXT} bytes" in line_of(regular.read_text, path)


def test_a_gzip_file_is_unpacked_as_far_as_its_header_says(tmp_path):
    raw = mnist_files.write(tmp_path, zipped=True)
    packed = zlib.compressobj(9, wbits=31)
    start = mnist_files.CONTENT[mnist_files.TRAIN_LABELS]
    block = packed.compress(start) + packed.compress(bytes(50 * 2**20)) + packed.flush()
    (raw / f"{mnist_files.TRAIN_LABELS}.gz").write_bytes(block)
    told = line_of(load_mnist, tmp_path)
    assert f"found more than {len(start)} bytes, expected {len(start)} after its header" in told
    header = bytes([0, 0, 8, 1]) + struct.pack(">I", 2**32 - 1)
    (raw / f"{mnist_files.TRAIN_LABELS}.gz").write_bytes(gzip.compress(header))
    assert f"expected {regular.IDX} at the most" in line_of(load_mnist, tmp_path)


def test_arrays_that_declare_more_than_is_there_are_not_read(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("key.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)}
        )
    assert f"its header speaks of {2**43} bytes, and 0 follow it" in line_of(Arrays(path).__getitem__, "key")
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02") + 24  # the unpacked size in the directory
    data[place : place + 4] = struct.pack("<I", 3 * 2**30)
    path.write_bytes(data)
    assert "it cannot have 3221225472 bytes" in line_of(Arrays(path).__getitem__, "key")


@pytest.mark.parametrize(
    "unpacked, packed, refused", [(2**31, 2**20, True), (2**31, 2**26, False), (2**20, 1, False)]
)
def test_few_bytes_do_not_become_very_many(unpacked, packed, refused):
    if refused:
        assert "2147483648 bytes of the 1048576" in line_of(regular.check_unpacked, "x", unpacked, packed)
    else:
        regular.check_unpacked("x", unpacked, packed)


def test_a_table_that_repeats_one_value_for_ever_is_not_read(tmp_path, monkeypatch):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    pd.DataFrame({"a": np.zeros(200_000)}).to_parquet(path)
    assert len(read_table(path)[0]) == 200_000
    monkeypatch.setattr(regular, "UNPACKED", 10_000)
    assert "more than 50 times as many" in line_of(read_table, path)


def test_the_first_line_of_a_table_is_of_some_length(tmp_path):
    pytest.importorskip("pandas")
    path = tmp_path / "x.csv"
    path.write_bytes(b"a" * (regular.LINE + 1))
    assert "a first line of more than" in line_of(read_table, path)
    path.write_text("a," * regular.COLUMNS + "\n1\n")
    assert f"{regular.COLUMNS + 1} columns" in line_of(read_table, path)


# --- images ---------------------------------------------------------------------------------------


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """A program in the place of PostScript's interpreter that leaves a file when it is started."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("gs", "gswin64c"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path / "started"


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif"])
def test_postscript_by_any_name_starts_no_program(tmp_path, interpreter, name):
    for path in (tmp_path / "data" / "one" / name, tmp_path / "data" / "two" / name):
        path.parent.mkdir(parents=True)
        path.write_bytes(POSTSCRIPT)
    own = tmp_path / "data" / "one" / name
    for function, given in (
        (Decoder((8, 8), "L").image, own),
        (Decoder((8, 8), "RGB").look, own),
        (Pictures(1, 8, 8).inputs, [own]),
        (Pictures(1, 8, 8).inputs, [POSTSCRIPT]),
    ):
        assert "it is of none of the formats PNG, JPEG" in line_of(function, given)
    assert name in line_of(lambda: load_folder(tmp_path / "data", size=(8, 8), shares=(0.5, 0, 0.5)))
    assert not interpreter.exists()


def png_of(width, height):
    """A PNG file that declares a size, and has nothing of it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + bytes(4)
        + b"IDAT"
    )


@pytest.mark.parametrize("side", [10_000, 50_000, 2**31 - 1])
def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, side):
    (tmp_path / "x.png").write_bytes(png_of(side, side))
    told = line_of(Decoder((8, 8), "L").image, tmp_path / "x.png")
    assert "x.png" in told and "more than 89.5 million pixels" in told
