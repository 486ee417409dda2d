"""What the inductor has compiled is kept as a library, and found again by what it depends on."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fomaml
from fomaml.engines import _torch
from fomaml.engines.compiled import kept
from fomaml.engines.compiled.cache import too_old
from fomaml.engines.cpu import build

pytestmark = pytest.mark.skipif(bool(too_old()), reason=too_old())
OPTIONS = {"cpp_wrapper": True, "cpp_cache_precompile_headers": False}
INPUTS = [torch.randn(3, 4), torch.randn(3, 4)]


def graph(factor=2.0):
    made = _torch.trace(lambda a, b: [a * factor + b, a.sum()], *INPUTS)
    for node in made.graph.nodes:
        node.meta.pop("val", None)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache in which one function was compiled."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("FOMAML_KEEP_COMPILED", "1")
        kept.induced(graph(), INPUTS, OPTIONS)
    [own] = (folder / "fomaml").iterdir()
    return own


@pytest.fixture
def again(folder, monkeypatch):
    """The kept library in a cache of its own; `again()` takes it up, and says whether anything was compiled."""
    compiled = []
    real = _torch.induce

    def induce(*arguments):
        compiled.append(1)
        return real(*arguments)

    monkeypatch.setattr(_torch, "induce", induce)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent.parent))
    monkeypatch.setenv("FOMAML_KEEP_COMPILED", "1")

    def run(graph=None, inputs=INPUTS, options=OPTIONS):
        before = len(compiled)
        found = kept.induced(graph or globals()["graph"](), inputs, options)(*inputs)
        return found, len(compiled) > before

    return run


def test_it_is_found_again_and_gives_the_same(again):
    found, compiled = again()
    assert not compiled
    torch.testing.assert_close(found[0], 2 * INPUTS[0] + INPUTS[1])
    torch.testing.assert_close(found[1], INPUTS[0].sum())


def test_a_damaged_one_is_noticed_and_built_anew(again, folder):
    whole = folder.read_bytes()
    try:
        for damaged in (whole[:-1], whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:], whole[:-40], b""):
            folder.unlink()  # this process has loaded it
            folder.write_bytes(damaged)
            found, compiled = again()
            assert compiled
            torch.testing.assert_close(found[0], 2 * INPUTS[0] + INPUTS[1])
            assert build.sealed(folder.read_bytes()[: -build.DIGEST]) == folder.read_bytes()
    finally:
        folder.unlink()
        folder.write_bytes(whole)


def test_its_name_is_of_all_that_it_depends_on(monkeypatch):
    def name():
        return build.name_of("compiled", kept._facts(own, inputs, options))

    own, inputs, options = graph(), INPUTS, OPTIONS
    names = {name()}
    own = graph(3.0)
    names.add(name())
    own, inputs = graph(), [tensor.T.contiguous().T for tensor in INPUTS]
    names.add(name())
    inputs = [tensor.double() for tensor in INPUTS]
    names.add(name())
    inputs, options = INPUTS, {**OPTIONS, "cpp.threads": 1}
    names.add(name())
    options = OPTIONS
    for place, what in (
        ("torch.__version__", "9.9"),
        ("fomaml.engines.cpu.build._processor", lambda: "another"),
        ("fomaml.engines.cpu.build._version", lambda command: "another"),
        ("torch.get_num_threads", lambda: 77),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, what)
            names.add(name())
    with monkeypatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_FREEZING", "1")
        names.add(name())
    assert len(names) == 10 and name() in names


def drawing(a, b):
    return [torch.nn.functional.dropout(a) + b]


def writing(a, b):
    return [a.add_(b)]


@pytest.mark.parametrize("function", [drawing, writing, lambda a, b: [a + torch.arange(4) + b * INPUTS[0]]])
def test_what_is_more_than_operators_of_its_inputs_is_not_kept(function):
    made = make_fx(function)(*[tensor.clone() for tensor in INPUTS])
    gc.collect()
    assert not kept._can_be_kept(made)


def test_what_the_library_alone_does_not_give_is_not_trusted():
    def changed(*inputs):
        return [tensor + 1 for tensor in function(*inputs)]

    function = graph()
    assert kept._agree(function, function, INPUTS)
    assert not kept._agree(function, changed, INPUTS)
    assert not kept._agree(function, lambda *inputs: function(*inputs)[:1], INPUTS)
    assert not kept._agree(function, lambda *inputs: 1 / 0, INPUTS)


def test_it_can_be_switched_off_and_folders_may_take_no_files(again, monkeypatch, tmp_path):
    monkeypatch.setattr(_torch, "induce", lambda *_: (graph(), None))
    monkeypatch.setenv("FOMAML_KEEP_COMPILED", "0")
    torch.testing.assert_close(again()[0][0], 2 * INPUTS[0] + INPUTS[1])
    monkeypatch.setenv("FOMAML_KEEP_COMPILED", "1")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    torch.testing.assert_close(again()[0][0], 2 * INPUTS[0] + INPUTS[1])


def test_a_second_process_does_not_load_torchs_compiler(folder):
    program = f"""
import torch
from fomaml.engines import _torch
run = _torch.entry_of(__import__("pathlib").Path({str(folder)!r}))
a, b = torch.ones(3, 4), torch.ones(3, 4)
assert torch.equal(run(a, b)[0], 3 * a)
import sys
assert "torch._inductor.compile_fx" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(Path(fomaml.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
