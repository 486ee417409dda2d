"""Files that are damaged or mean harm, and words that are no command: a clean result or one line, never anything else.

`test_hostile.py` changes more kinds of files, a few times each.
"""

import os
import socket
import time

import pytest

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis changes the files, of the extra test")
pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
pytest.importorskip("PIL", reason="images are read by Pillow, of the extra images")

from hypothesis import strategies as st  # noqa: E402

import mutations  # noqa: E402

quick = hypothesis.settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = mutations.Bench(tmp_path_factory.mktemp("bench") / "all")
    with pytest.MonkeyPatch.context() as patch:
        made.kill(patch)
    return made


@quick
@hypothesis.given(data=st.data())
def test_a_spoiled_file_of_a_run_is_noticed_or_harmless(bench, data):
    name = data.draw(st.sampled_from(sorted(mutations.USES)))
    whole = (bench.run / name).read_bytes()
    kinds = [mutations.changed_bytes(whole)] + [mutations.changed_json(whole)] * name.endswith(".json")
    uses = [use for use in mutations.USES[name] if not use.startswith("report")]
    bench.spoiled_run(name, data.draw(st.one_of(kinds)), data.draw(st.sampled_from(uses)))


@quick
@hypothesis.given(data=st.data())
def test_a_spoiled_killed_run_ends_the_same_or_not_at_all(bench, data):
    name = data.draw(st.sampled_from(mutations.OF_A_KILLED_ONE))
    bench.spoiled_killed_run(name, data.draw(mutations.changed_bytes((bench.killed / name).read_bytes())))


@quick
@hypothesis.given(data=st.data())
def test_spoiled_data_are_read_or_refused(bench, data):
    name = data.draw(st.sampled_from(sorted(mutations.DATA)))
    bench.spoiled_data(name, data.draw(mutations.changed_bytes((bench.data / name).read_bytes())))


@hypothesis.settings(quick, max_examples=100)
@hypothesis.given(words=mutations.command_lines())
def test_any_words_are_a_command_or_one_line(tmp_path_factory, words):
    folder = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mutations.check_one_line(mutations.said(words), words)


# --- what a program would be started for, or never end ---------------------------------------------


def test_a_picture_that_is_a_program_is_not_run(bench, tmp_path, monkeypatch):
    """Pillow has an interpreter of PostScript decode it, whatever its suffix."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho run > {tmp_path / 'marker'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    own = bench._copy(bench.data)
    (own / "pictures" / "c1" / "1.png").write_bytes(program)
    found = mutations.said(["data", f"folder:{own / 'pictures'}", "--out", str(tmp_path / "seen")])
    assert found.status == 2 and "1.png cannot be read as an image" in found.error
    assert not (tmp_path / "marker").exists()


def endless(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # its name may not be long
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(path.name)
        os.chdir(here)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("name", [*mutations.DATA, *mutations.USES, "state.safetensors"])
def test_what_never_ends_is_not_read(bench, name, kind, tmp_path):
    if name in mutations.DATA:
        own = bench._copy(bench.data)
        use = mutations.DATA[name].replace("FILE", str(own / name)).replace("ROOT", str(own))
        words = [*use.split(), "--out", str(tmp_path / "seen")]
    else:
        own = bench._copy(bench.killed if name.startswith("state") else bench.run)
        use = mutations.USES.get(name, ("train --resume RUN",))[0]
        words = use.replace("RUN", str(own)).split()
    (own / name).unlink()
    endless(own / name, kind)
    began = time.monotonic()
    found = mutations.said(words)
    assert time.monotonic() - began < 30
    if name == "state.safetensors":  # the one before it is whole
        assert found.status == 0 and "going on from the state before it" in found.out
        return
    mutations.check_one_line(found, name)
    if name == "MNIST/raw/train-images-idx3-ubyte.gz" or name not in mutations.DATA:
        assert found.status == 2, found
        assert "expected an ordinary file" in found.error or "is damaged" in found.error, found
