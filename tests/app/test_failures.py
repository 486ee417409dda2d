"""What the machine refuses ends a command in one line and status 2, and leaves nothing half-written."""

import contextlib
import errno
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from commands import refused
from fomaml.app import cli, failures
from fomaml.app.cli import Command, main
from fomaml.app.commands import PresetsOptions
from fomaml.checkpoint import save_weights
from fomaml.files import load_tensors, save_tensors, write_text

QUICK = ["--iterations", 2, "--meta-batch-size", 2, "--test-tasks", 4, "--test-steps", 0, 1, "--no-baselines"]


def raising(monkeypatch, make):
    """Let `fomaml presets` end with an error."""

    def run(options):
        make()

    monkeypatch.setitem(cli.COMMANDS, "presets", Command(PresetsOptions, run))


def thrown(error):
    def throw():
        raise error

    return throw


def system(number, path=None):
    return thrown(OSError(number, os.strerror(number), path))


CONVERTED = [
    (system(errno.ENOSPC, "a/b"), "a/b: No space left on device; make room there, or give another place"),
    (system(errno.EROFS, "a"), "a: Read-only file system; give a place that can be written to"),
    (system(errno.EACCES, "a"), "a: Permission denied; look at its permissions"),
    (system(errno.ENAMETOOLONG, "a"), "a: File name too long; give a shorter name"),
    (system(errno.ENOENT, "a\nb\udcff"), "a\\nb\\udcff: No such file or directory; was it moved or deleted?"),
    (system(errno.EIO), "Input/output error"),
    (system(errno.EMFILE, "a"), "a: Too many open files; raise the limit"),
    (thrown(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")), "Connection reset by peer"),
    (thrown(OSError("cannot identify\nit")), "OSError: cannot identify"),
    (thrown(SafetensorError("Error while deserializing header")), "a safetensors file is damaged"),
    (thrown(MemoryError()), "out of memory (no message): give --tasks-at-once 1"),
    (thrown(torch.OutOfMemoryError("CUDA out of memory. Tried")), "out of memory (CUDA out of memory): give"),
    (
        thrown(
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 2500000000 bytes."
            )
        ),
        "out of memory (2.5 GB were asked for): give",
    ),
    (lambda: "\ud800".encode(), "text that is not utf-8: 'utf-8' codec can't encode"),
    (lambda: b"\xff".decode(), "text that is not utf-8: 'utf-8' codec can't decode"),
    (lambda: "x" * 10**30, "a number is too large"),
    (lambda: json.loads("[" * 100_000), "what was read is nested too deeply"),
]


@pytest.mark.parametrize(("make", "message"), CONVERTED)
def test_what_the_machine_refuses_is_one_line(make, message, monkeypatch, capsys):
    raising(monkeypatch, make)
    assert refused(capsys, ["presets"]).startswith(message)


def endless(number):
    return endless(number + 1)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (thrown(RuntimeError("shapes do not match")), RuntimeError),
        (thrown(KeyError("x")), KeyError),
        (thrown(ValueError("x")), ValueError),
        (thrown(TypeError("x")), TypeError),
        (thrown(AssertionError("x")), AssertionError),
        (lambda: endless(0), RecursionError),
    ],
)
def test_a_mistake_in_the_program_keeps_its_traceback(make, kind, monkeypatch):
    raising(monkeypatch, make)
    with pytest.raises(kind):
        main(["presets"])


# --- standard output --------------------------------------------------------------------------------


class Broken(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (errno.EPIPE, 141, ""),
        (errno.ENOSPC, 2, "fomaml: error: standard output cannot be written to: No space left on device\n"),
    ],
)
@pytest.mark.parametrize("arguments", [["presets"], ["--help"], ["train", "--help"]])
def test_standard_output_that_takes_nothing(number, status, message, arguments, capsys, monkeypatch):
    broken = Broken(number)
    monkeypatch.setattr(sys, "stdout", broken)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert (stop.value.code, capsys.readouterr().err) == (status, message)
    assert sys.stdout is broken  # as it was before


def test_a_pipe_that_is_closed_is_quiet_to_the_end():
    """Python itself complains of what it cannot write at its exit: seen in a process of its own alone."""
    code = "from fomaml.app.failures import told_in_one_line\nwith told_in_one_line(): print('x' * 100_000)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_an_encoding_lacks_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with failures.told_in_one_line():
        print("98 ± 1, \udcff")
    assert stream.buffer.getvalue() == b"98 \\xb1 1, \\udcff\n"


# --- files ------------------------------------------------------------------------------------------


def full(monkeypatch, after):
    """A disk that takes so many more files."""
    left = [after]

    def fsync(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fomaml.files.os.fsync", fsync)


@pytest.mark.parametrize("after", range(4))
def test_a_full_disk_in_a_training(after, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        full(patch, after)
        said = refused(capsys, ["train", "sinusoid", *QUICK, "--out", out])
    assert "No space left on device; make room there" in said and str(out) in said
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert after or not out.exists()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "new"),
        lambda path: save_tensors(path, {"a": torch.ones(3)}),
        lambda path: save_weights(path, torch.nn.Linear(2, 2)),
    ],
)
def test_a_file_that_cannot_be_written_is_as_before(write, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    full(monkeypatch, 0)
    with pytest.raises(OSError, match="No space left on device") as error:
        write(path)
    assert error.value.filename == str(path) and error.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_safetensors_own_words_for_a_full_disk_name_the_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"

    def write(tensors, temporary, header):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fomaml.files.save_file", write)
    with pytest.raises(OSError, match="No space left") as error:
        save_tensors(path, {"a": torch.ones(3)})
    assert error.value.filename == str(path) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "a" * 300], "File name too long; give a shorter name"),
        (["evaluate", "no\nrun"], "no\\nrun holds no run (no config.json)"),
        (["evaluate", "\udcff"], "\\udcff holds no run (no config.json)"),
        (["train", "sinusoid", *QUICK, "--out", "a" * 300], "File name too long"),
        (["train", "sinusoid", *QUICK, "--out", "/dev/null/run"], "cannot make the run directory"),
        (["train", "sinusoid", "--resume", "/nonexistent"], "--resume takes the settings of the run"),
        (["train", "--resume", "/nonexistent"], "/nonexistent holds no run"),
        (["train", "folder:\udcff\n"], "No such file or directory, expected a folder of images"),
        (["train", "table:no/t.csv", "--task", "a", "--target", "b"], "no/t.csv"),
        (["evaluate", "/dev/null"], "/dev/null holds no run"),
    ],
)
def test_paths_that_are_none(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, arguments)
    assert message in said and len(said) < 500
    assert not list(tmp_path.iterdir())


def test_a_current_directory_that_is_deleted(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    raising(monkeypatch, os.getcwd)
    try:
        assert (
            refused(capsys, ["presets"]) == "the current directory is not there any more: go to one that is"
        )
    finally:
        os.chdir(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, b"\x00" * 8, (2**40).to_bytes(8, "little") + b"{}"])
def test_weights_that_are_damaged(damage, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        load_tensors(path)


def test_lines_are_short_and_whole():
    assert failures.one_line("a\r\nb\u2028c\x1b[31m") == "a\\r\\nb\\u2028c\\x1b[31m"
    assert len(failures.one_line("--shots takes a whole number, got '" + "9" * 5000 + "'")) < 300
    long = " ".join(["word"] * 200)
    assert failures.one_line(long) == long
    with contextlib.redirect_stdout(io.StringIO()) as printed, failures.told_in_one_line():
        print("as it is")
    assert printed.getvalue() == "as it is\n"
