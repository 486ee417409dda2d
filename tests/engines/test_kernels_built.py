"""Building the kernels: the compilers that fail, and the cache that keeps what was built."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from fomaml.engines import meta_gradient, plan
from fomaml.engines.compiled.cache import too_old
from fomaml.engines.cpu import build
from fomaml.learning.algorithms import FOMAML
from fomaml.tasks import Examples, Task
from zoo import draw


def script(path, text, version=1):
    """A compiler that says its version, and else does this."""
    asked = f'case "$*" in *--version*) echo {version}; exit;; esac'
    path.write_text(f"#!/bin/sh\n{asked}\n{text}\n")
    path.chmod(0o755)
    return path


def works(kernels):
    return isinstance(kernels, ctypes.CDLL) and kernels.forward_float32 and kernels.backward_float32


def small():
    """A convolutional learner, its tasks and the meta-gradient of the slow loop."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    ).double()
    sets = [Examples(torch.randn(2, 4, 1, 6, 6).double(), torch.arange(4).expand(2, 4) % 2) for _ in range(2)]
    tasks = Task(*sets)
    rates = dict.fromkeys(reference.learned(model), 0.1)
    expected = reference.over_tasks(
        lambda m, t: reference.fomaml(m, t, F.cross_entropy, rates, 2), model, tasks
    )
    return FOMAML(model, 0.1, 2), tasks, expected


def assert_runs_uncompiled(message):
    learner, tasks, expected = small()
    with pytest.warns(RuntimeWarning, match=message) as warned:
        found = meta_gradient(learner, tasks, compile=True)
    assert len(warned) == 1 and warned[0].filename == __file__
    for _ in range(2):
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=0, atol=1e-12)
        found = meta_gradient(learner, tasks, compile=True)  # and says so once


def test_a_compiler_that_fails(fresh, monkeypatch):
    monkeypatch.setenv("CXX", str(script(fresh / "c++", "echo 'what is this?' >&2; exit 1")))
    with pytest.raises(RuntimeError, match=r"c\+\+ failed: what is this\?$"):
        build.library()
    assert list(fresh.rglob("*.so*")) == []
    assert_runs_uncompiled("compile=True runs uncompiled: .*failed: what is this")


def test_a_compiler_that_fails_without_a_word(fresh, monkeypatch):
    monkeypatch.setenv("CXX", str(script(fresh / "c++", "exit 3")))
    with pytest.raises(RuntimeError, match=r"c\+\+ failed: no message$"):
        build.library()


def test_a_compiler_that_is_not_there(fresh, monkeypatch):
    monkeypatch.setenv("CXX", str(fresh / "none"))
    with pytest.raises(RuntimeError, match=r"none failed: .*No such file"):
        build.library()
    assert_runs_uncompiled("compile=True runs uncompiled: .*none failed: .*No such file")


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(RuntimeError, match=r"^there is no C\+\+ compiler on this machine$"):
        build.library()
    assert_runs_uncompiled("compile=True runs uncompiled: there is no C")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The kernels as other tests have them, apart from any cache and without a digest."""
    path = tmp_path_factory.mktemp("built") / "kernels.so"
    build._loaded.clear()
    path.write_bytes(Path(build.library()._name).read_bytes()[: -build.DIGEST])
    return path


@pytest.fixture
def quick(fresh, built, monkeypatch):
    """A compiler that copies the kernels built before, and notes each call."""
    # as many set it: with options, or behind ccache
    monkeypatch.setenv("CXX", f"{script(fresh / 'quick', copying(fresh, built))} -O2")
    return fresh


def copying(folder, built):
    return f'echo x >> "{folder}/calls"; while [ "$1" != -o ]; do shift; done; cp "{built}" "$2"'


def calls(folder):
    """How often all was built: the compiler runs for each source, and to put them together."""
    times = (folder / "calls").read_text().count("x") if (folder / "calls").exists() else 0
    assert times % (len(build.STACKED) + 1) == 0
    return times // (len(build.STACKED) + 1)


def kept(folder):
    return sorted(path.relative_to(folder).parent.as_posix() for path in folder.rglob("*.so*"))


def test_built_once_and_kept(quick):
    for _ in range(2):
        build._loaded.clear()
        assert works(build.library())
    assert calls(quick) == 1
    assert kept(quick) == ["cache/fomaml"]


def test_built_again_by_another_version_of_the_compiler(quick, built):
    assert works(build.library())
    script(quick / "quick", copying(quick, built), version=2)
    for _ in range(2):
        build._loaded.clear()
        assert works(build.library())
    assert calls(quick) == 2
    assert len([*quick.rglob("*.so")]) == 2


def test_kernels_declare_the_types_of_their_arguments():
    """A float in the place of a whole number, or an argument too few, would be read as garbage."""
    for dtype in ("float32", "float64"):
        kernels = build.library(dtype)
        for name, types in build.STACKED_ARGUMENTS.items():
            assert getattr(kernels, f"{name}_{dtype}").argtypes == types
            assert getattr(kernels, f"{name}_{dtype}").restype is None
    kernels = build.library()
    assert not hasattr(kernels, "forward_float64")  # which would take as long again to build
    with pytest.raises(ctypes.ArgumentError):
        kernels.use_threads(1.5)
    with pytest.raises(TypeError, match="at least 11 arguments"):
        kernels.backward_float32(0)


def test_a_loop_over_tasks_has_no_kernels_of_convolutions_built(fresh):
    few = build.library("float64", stacked=False)
    assert few.forward_float64 and not hasattr(few, "convolve_float64")
    learner, tasks, expected = small()
    found = meta_gradient(learner, tasks, engine="loop", compile=True)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=0, atol=1e-12)
    assert [*build._loaded] == [("float64", False)]
    every = build.library("float64")
    assert build.library("float64", stacked=False) is every  # one crew of threads for all
    assert len([*fresh.rglob("*.so")]) == 2


def test_every_kernel_is_declared():
    sources = "".join(path.read_text(encoding="utf-8") for path in build.STACKED)
    entries = re.findall(r"extern \"C\" void (\w+)_##NAME\(", sources)
    assert sorted(entries) == sorted(build.STACKED_ARGUMENTS)
    text = "".join(path.read_text(encoding="utf-8") for path in build.PRODUCTS)
    assert re.findall(r"extern \"C\" void (\w+)_##NAME\(", text) == [*build.PRODUCT]


@pytest.mark.parametrize("hindrance", ["a file", "a file above"])
def test_a_cache_folder_that_takes_no_files(quick, hindrance):
    (quick / "cache").mkdir()
    path = quick / "cache" / "fomaml" if hindrance == "a file" else quick / "cache"
    if path.is_dir():
        path.rmdir()
    path.write_text("in the way")
    assert works(build.library())
    assert kept(quick) == [f"temporary/fomaml-{os.getuid()}"]


def test_a_temporary_folder_of_somebody_else_is_not_trusted(quick, monkeypatch):
    """Whoever makes it first could put any code into it."""
    own = os.getuid()
    (quick / "cache").write_text("in the way")
    folder = quick / "temporary" / f"fomaml-{own + 1}"
    folder.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.raises(RuntimeError, match=r"could not be kept: .*belongs to somebody else"):
        build.library()
    assert calls(quick) == 0


def test_nowhere_to_keep_them(quick):
    (quick / "cache").write_text("in the way")
    (quick / "temporary" / f"fomaml-{os.getuid()}").write_text("in the way")
    with pytest.raises(RuntimeError, match="the kernels could not be kept: "):
        build.library()


@pytest.mark.parametrize("content", [b"", b"nonsense" * 1000, "half", "other"], ids=str)
def test_a_corrupted_file_in_the_cache_is_built_again(quick, built, content):
    assert works(build.library())
    [path] = quick.rglob("*.so")
    path.unlink()  # what is loaded stays as it is
    if content == "half":
        content = built.read_bytes()[: built.stat().st_size // 2]
    elif content == "other":
        content = Path(torch._C.__file__).read_bytes()  # loads, but has no kernels
    path.write_bytes(content)
    build._loaded.clear()
    assert works(build.library())
    assert calls(quick) == 2
    assert kept(quick) == ["cache/fomaml"]
    assert path.read_bytes().startswith(built.read_bytes())


def test_a_compiler_that_makes_nonsense(fresh, monkeypatch):
    text = 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'
    monkeypatch.setenv("CXX", str(script(fresh / "nonsense", text)))
    with pytest.raises(RuntimeError, match="nonsense made something that does not load: "):
        build.library()


def test_two_processes_and_two_threads_build_at_once(fresh, built, monkeypatch):
    # none of the four goes on before each has begun all that it begins at once
    begun = 4 * min(os.cpu_count() or 1, len(build.STACKED))
    text = f"""echo x >> "{fresh}/calls"; while [ "$1" != -o ]; do shift; done
    for i in $(seq 6000); do [ $(wc -l < "{fresh}/calls") -ge {begun} ] && break; sleep 0.1; done
    cp "{built}" "$2" """
    monkeypatch.setenv("CXX", str(script(fresh / "slow", text)))
    code = """if True:
        import tempfile, threading
        from fomaml.engines.cpu.build import _library
        tempfile.tempdir = {temporary!r}
        found = []
        threads = [threading.Thread(target=lambda: found.append(_library('float32', True))) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(found) == 2 and all(one.forward_float32 for one in found)
    """.format(temporary=str(fresh / "temporary"))
    environment = os.environ | {"PYTHONPATH": str(Path(build.__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code], env=environment, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in running:
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
    assert calls(fresh) == 4  # they did overlap
    assert kept(fresh) == ["cache/fomaml"]


def test_a_build_that_was_begun_is_waited_for(quick):
    build.begin("float32")
    build.begin("float32")
    begun = build._begun["float32", True]
    assert build.library() is begun.result() and works(build.library()) and not build._begun
    build.begin("float32")  # this process has its kernels
    assert not build._begun and calls(quick) == 1


@pytest.mark.skipif(bool(too_old()), reason=too_old())
def test_a_plan_that_is_compiled_begins_to_build(quick):
    learner, tasks, _ = small()
    plan(learner, tasks)
    assert not build._begun
    plan(learner, tasks, compile=True)
    assert [*build._begun] == [("float64", True)]
    build._begun.clear()
    plan(learner, tasks, engine="loop", compile=True)
    assert [*build._begun] == [("float64", False)]
    plan(
        FOMAML(nn.Linear(2, 2), 0.1, 1),
        draw((2,), F.cross_entropy, ways=2).to(dtype=torch.float32),
        compile=True,
    )
    assert [*build._begun] == [("float64", False)]


def test_a_begun_build_that_fails_is_told_where_it_is_needed(fresh, monkeypatch):
    monkeypatch.setenv("CXX", str(script(fresh / "c++", "exit 3")))
    build.begin("float64")
    assert_runs_uncompiled("compile=True runs uncompiled: .*failed: no message")
