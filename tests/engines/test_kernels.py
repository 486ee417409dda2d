"""The fused kernels against autograd through the three operators they stand for."""

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from fomaml.engines import meta_gradient
from fomaml.engines.cpu import kernels
from fomaml.engines.cpu.kernels import channels_last, norm_relu_pool, norm_relu_pool_backward
from fomaml.learning.algorithms import FOMAML
from fomaml.tasks import Examples, Task

EPS = 1e-5


def operators(inputs, gamma, beta, pool, eps=EPS):
    outputs = F.relu(F.batch_norm(inputs, None, None, gamma, beta, training=True, eps=eps))
    return F.max_pool2d(outputs, 2) if pool else outputs


def both(inputs, gamma, beta, pool, slope=None):
    """(outputs, derivatives by inputs, γ and β) of the kernels, and of the operators in float64."""
    outputs, *kept = norm_relu_pool(inputs, gamma, beta, EPS, pool)
    slope = torch.randn_like(outputs) if slope is None else slope
    found = [outputs, *norm_relu_pool_backward(slope, outputs, *kept, gamma, pool)]
    channels = inputs.shape[1]
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    leaves = [inputs, ones if gamma is None else gamma, zeros if beta is None else beta]
    # contiguous: torch 2.14's own derivative of channels-last images takes a strided γ for a contiguous one
    leaves = [leaf.detach().double().contiguous().requires_grad_() for leaf in leaves]
    expected = operators(*leaves, pool)
    return found, [expected.detach(), *torch.autograd.grad(expected, leaves, slope.double())]


def assert_equal(found, expected, tolerance):
    """Within the tolerance of the largest entry."""
    for name, ours, theirs in zip(("outputs", "by inputs", "by gamma", "by beta"), found, expected):
        assert ours.shape == theirs.shape
        scale = max(1.0, theirs.abs().max().item())
        assert (ours.double() - theirs).abs().max().item() <= tolerance * scale, name


def affine(channels, dtype=torch.float64):
    gamma, beta = torch.randn(2, channels, dtype=dtype)
    return gamma, beta


POOL = pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])


@POOL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 16, 37])
@pytest.mark.parametrize(
    ("images", "height", "width"),
    [(4, 6, 6), (3, 7, 5), (3, 6, 5), (2, 5, 8), (1, 4, 4), (1, 3, 2), (5, 2, 2)],
)
def test_agrees_with_the_operators(images, height, width, channels, dtype, pool):
    inputs = torch.randn(images, channels, height, width, dtype=dtype)
    found, expected = both(inputs, *affine(channels, dtype), pool)
    assert all(f.dtype == dtype for f in found)
    # a variance of a few numbers may be tiny, and then what divides by it is large
    assert_equal(found, expected, 1e-12 if dtype == torch.float64 else 2e-5)


@POOL
def test_the_blocks_of_the_sums_may_be_full_or_not(pool):
    """The kernels add up in blocks of 64 pixels."""
    for images, size in [(1, 8), (1, 16), (5, 16), (3, 9)]:
        inputs = torch.randn(images, 5, size, size, dtype=torch.float64)
        assert_equal(*both(inputs, *affine(5), pool), 1e-12)


@POOL
@pytest.mark.parametrize("given", ["neither", "gamma", "beta"])
def test_without_gamma_or_beta(given, pool):
    gamma, beta = affine(6)
    inputs = torch.randn(4, 6, 5, 6, dtype=torch.float64)
    gamma, beta = gamma if given == "gamma" else None, beta if given == "beta" else None
    assert_equal(*both(inputs, gamma, beta, pool), 1e-12)


@POOL
def test_negative_and_zero_gamma(pool):
    gamma = torch.tensor([-1.0, 0.0, 0.0, 0.0, -0.3, 2.0], dtype=torch.float64)
    beta = torch.tensor(
        [0.3, 0.5, 0.0, -0.5, -0.1, 0.0], dtype=torch.float64
    )  # with γ = 0 the output is ReLU(β)
    inputs = torch.randn(4, 6, 6, 7, dtype=torch.float64)
    assert_equal(*both(inputs, gamma, beta, pool), 1e-12)


@POOL
def test_ties_within_a_window(pool):
    torch.manual_seed(1)
    inputs = torch.randint(-1, 2, (5, 7, 6, 6)).double()  # three values: nearly every window has a tie
    assert_equal(*both(inputs, *affine(7), pool), 1e-12)
    gamma, beta = torch.ones(2, 7, dtype=torch.float64)
    assert_equal(*both(torch.full_like(inputs, 3.0), gamma, beta, pool), 1e-10)  # 1 / deviation is 316
    assert_equal(*both(torch.full_like(inputs, 0.1), gamma, -beta, pool), 1e-10)
    found, _ = both(torch.zeros_like(inputs), gamma, 0 * beta, pool)
    assert all(not f.any() for f in found)


@POOL
@pytest.mark.parametrize("mean", [1e3, -1e3, 1e5])
def test_a_large_mean_does_not_cancel_the_variance(mean, pool):
    inputs = torch.randn(5, 6, 12, 12) + mean
    gamma, beta = affine(6, torch.float32)
    found, expected = both(inputs, gamma, beta, pool)
    _, _, _, seen, deviation = norm_relu_pool(inputs, gamma, beta, EPS, pool)
    exact = inputs.double()
    variance, middle = torch.var_mean(exact, (0, 2, 3), correction=0)
    torch.testing.assert_close(deviation.double(), (variance + EPS).rsqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.double(), middle, rtol=1e-7, atol=0)
    # the rounding of the inputs themselves, |mean| 6e-8, moves what is near a kink
    assert (found[0].double() - expected[0]).abs().max() <= 4e-7 * abs(mean)
    if abs(mean) == 1e3:
        for ours, theirs in zip(found[2:], expected[2:]):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=0.2)


@POOL
@pytest.mark.parametrize(
    "order", ["contiguous", "channels-last", "sliced", "transposed", "expanded", "shifted"]
)
def test_any_order_of_the_inputs(order, pool):
    make = partial(torch.randn, dtype=torch.float64)
    inputs = {
        "contiguous": lambda: make(4, 5, 6, 7),
        "channels-last": lambda: channels_last(make(4, 5, 6, 7)),
        "sliced": lambda: make(8, 10, 13, 7)[::2, 2:7, 1::2],
        "transposed": lambda: make(5, 4, 7, 6).permute(1, 0, 3, 2),
        "expanded": lambda: make(1, 5, 6, 7).expand(4, 5, 6, 7),
        "shifted": lambda: make(1 + 4 * 5 * 6 * 7)[1:].view(4, 5, 6, 7),
    }[order]()
    before = inputs.clone()
    gamma, beta = make(10)[::2], make(2, 5)[1]
    shape = operators(inputs, gamma, beta, pool).shape
    slopes = [
        make(shape),
        channels_last(make(shape)),
        make(1).expand(shape),
        make(*shape[:2], *(1, 1)).expand(shape),
    ]
    for slope in slopes:
        found, expected = both(inputs, gamma, beta, pool, slope)
        assert_equal(found, expected, 1e-12)
        assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(inputs, before)


@POOL
@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 5), (2, 3)])
def test_derivatives_in_the_place_of_the_inputs_are_the_same(height, width, pool):
    inputs = channels_last(torch.randn(3, 5, height, width, dtype=torch.float64))
    gamma, beta = affine(5)
    outputs, *kept = norm_relu_pool(inputs, gamma, beta, EPS, pool)
    slope = torch.randn_like(outputs)
    expected = norm_relu_pool_backward(slope, outputs, *kept, gamma, pool)
    found = norm_relu_pool_backward(slope, outputs, *kept, gamma, pool, True)
    assert found[0].data_ptr() == inputs.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (3, 4, 1, 1), (1, 4, 4, 4), (1, 1, 4, 4)])
def test_shapes_whose_order_is_ambiguous(shape):
    """With one channel or one pixel `is_contiguous` holds for both orders, whatever the strides."""
    for inputs in (torch.randn(shape), torch.randn(*shape[:2], 9, 9)[..., : shape[2], : shape[3]]):
        assert_equal(*both(inputs.double(), *affine(shape[1]), False), 1e-12)


@POOL
def test_not_a_number_goes_through(pool):
    inputs = torch.randn(3, 4, 6, 6)
    inputs[1, 2, 3, 3] = float("nan")
    gamma, beta = affine(4, torch.float32)
    outputs, *kept = norm_relu_pool(inputs, gamma, beta, EPS, pool)
    assert outputs[:, 2].isnan().all() and not outputs[:, [0, 1, 3]].isnan().any()
    by_inputs, by_gamma, _ = norm_relu_pool_backward(torch.ones_like(outputs), outputs, *kept, gamma, pool)
    assert by_inputs[:, 2].isnan().all() and not by_inputs[:, [0, 1, 3]].isnan().any()
    assert by_gamma.isnan().tolist() == [False, False, True, False]


@POOL
def test_an_infinite_number_is_not_hidden(pool):
    inputs = torch.randn(3, 2, 4, 4)
    inputs[0, 1, 0, 0] = float("inf")
    outputs = norm_relu_pool(inputs, None, None, EPS, pool)[0]
    assert outputs[:, 1].isnan().any() and outputs[:, 0].isfinite().all()


# --- building them ----------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """No kernels loaded and none in the cache, which is a temporary folder; so is the folder of temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    kernels.library.cache_clear()
    yield tmp_path
    kernels.library.cache_clear()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def works(library):
    return isinstance(library, ctypes.CDLL) and library.forward_float32 and library.backward_float64


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
        kernels.library()
    assert list(fresh.rglob("*.so*")) == []
    assert_runs_uncompiled("compile=True runs uncompiled: .*failed: what is this")


def test_a_compiler_that_fails_without_a_word(fresh, monkeypatch):
    monkeypatch.setenv("CXX", str(script(fresh / "c++", "exit 3")))
    with pytest.raises(RuntimeError, match=r"c\+\+ failed: no message$"):
        kernels.library()


def test_a_compiler_that_is_not_there(fresh, monkeypatch):
    monkeypatch.setenv("CXX", str(fresh / "none"))
    with pytest.raises(RuntimeError, match=r"none failed: .*No such file"):
        kernels.library()
    assert_runs_uncompiled("compile=True runs uncompiled: .*none failed: .*No such file")


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(RuntimeError, match=r"^there is no C\+\+ compiler on this machine$"):
        kernels.library()
    assert_runs_uncompiled("compile=True runs uncompiled: there is no C")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The kernels built once for these tests, apart from any cache."""
    path = tmp_path_factory.mktemp("built") / "kernels.so"
    subprocess.run([*kernels.compiler(), *kernels.FLAGS, "-o", path, *kernels.SOURCES], check=True)
    return path


@pytest.fixture
def quick(fresh, built, monkeypatch):
    """A compiler that copies the kernels built before, and notes each call."""
    text = f'echo x >> "{fresh}/calls"; while [ "$1" != -o ]; do shift; done; cp "{built}" "$2"'
    monkeypatch.setenv(
        "CXX", f"{script(fresh / 'quick', text)} -O2"
    )  # as many set it: with options, or behind ccache
    return fresh


def calls(folder):
    return (folder / "calls").read_text().count("x") if (folder / "calls").exists() else 0


def kept(folder):
    return sorted(path.relative_to(folder).parent.as_posix() for path in folder.rglob("*.so*"))


def test_built_once_and_kept(quick):
    for _ in range(2):
        kernels.library.cache_clear()
        assert works(kernels.library())
    assert calls(quick) == 1
    assert kept(quick) == ["cache/fomaml"]


@pytest.mark.parametrize("hindrance", ["a file", "a file above"])
def test_a_cache_folder_that_takes_no_files(quick, hindrance):
    (quick / "cache").mkdir()
    path = quick / "cache" / "fomaml" if hindrance == "a file" else quick / "cache"
    if path.is_dir():
        path.rmdir()
    path.write_text("in the way")
    assert works(kernels.library())
    assert kept(quick) == [f"temporary/fomaml-{os.getuid()}"]


def test_a_temporary_folder_of_somebody_else_is_not_trusted(quick, monkeypatch):
    """Whoever makes it first could put any code into it."""
    own = os.getuid()
    (quick / "cache").write_text("in the way")
    folder = quick / "temporary" / f"fomaml-{own + 1}"
    folder.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.raises(RuntimeError, match=r"could not be kept: .*belongs to somebody else"):
        kernels.library()
    assert calls(quick) == 0


def test_nowhere_to_keep_them(quick):
    (quick / "cache").write_text("in the way")
    (quick / "temporary" / f"fomaml-{os.getuid()}").write_text("in the way")
    with pytest.raises(RuntimeError, match="the kernels could not be kept: "):
        kernels.library()


@pytest.mark.parametrize("content", [b"", b"nonsense" * 1000, "half", "other"], ids=str)
def test_a_corrupted_file_in_the_cache_is_built_again(quick, built, content):
    assert works(kernels.library())
    [path] = quick.rglob("*.so")
    path.unlink()  # what is loaded stays as it is
    if content == "half":
        content = built.read_bytes()[: built.stat().st_size // 2]
    elif content == "other":
        content = Path(torch._C.__file__).read_bytes()  # loads, but has no kernels
    path.write_bytes(content)
    kernels.library.cache_clear()
    assert works(kernels.library())
    assert calls(quick) == 2
    assert kept(quick) == ["cache/fomaml"]
    assert path.read_bytes().startswith(built.read_bytes())


def test_a_compiler_that_makes_nonsense(fresh, monkeypatch):
    text = 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'
    monkeypatch.setenv("CXX", str(script(fresh / "nonsense", text)))
    with pytest.raises(RuntimeError, match="nonsense made something that does not load: "):
        kernels.library()


def test_two_processes_and_two_threads_build_at_once(fresh, built, monkeypatch):
    text = f"""echo x >> "{fresh}/calls"; while [ "$1" != -o ]; do shift; done
    for i in 1 2 3 4 5 6 7 8; do [ $(wc -l < "{fresh}/calls") -ge 4 ] || sleep 1; done; cp "{built}" "$2" """
    monkeypatch.setenv("CXX", str(script(fresh / "slow", text)))
    code = """if True:
        import tempfile, threading
        from fomaml.engines.cpu.kernels import library
        tempfile.tempdir = {temporary!r}
        build, found = library.__wrapped__, []
        threads = [threading.Thread(target=lambda: found.append(build())) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(found) == 2 and all(one.forward_float32 for one in found)
    """.format(temporary=str(fresh / "temporary"))
    environment = os.environ | {"PYTHONPATH": str(Path(kernels.__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code], env=environment, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in running:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
    assert calls(fresh) == 4  # they did overlap
    assert kept(fresh) == ["cache/fomaml"]


# --- convolutions -----------------------------------------------------------------------------------


def alone(inputs, weights, bias, slope, stride, padding):
    """(outputs, derivatives by inputs, weights and bias) of torch's own convolutions, task by task."""
    found = []
    for task in range(len(inputs)):
        weight = weights[task] if weights.dim() == 5 else weights
        leaves = [inputs[task], weight, bias[task] if bias.dim() == 2 else bias]
        leaves = [leaf.detach().double().contiguous().requires_grad_() for leaf in leaves]
        outputs = F.conv2d(*leaves, stride, padding)
        found.append([outputs.detach(), *torch.autograd.grad(outputs, leaves, slope[task].double())])
    return [torch.stack(each) for each in zip(*found)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(
    ("channels", "outputs"), [(16, 5), (32, 64), (48, 16), (80, 7), (1, 16), (2, 48), (7, 32)]
)
@pytest.mark.parametrize(
    ("images", "window", "stride", "padding"),
    [
        ((3, 7, 8), (3, 3), (1, 1), (1, 1)),
        ((5, 7, 7), (3, 3), (2, 2), (1, 1)),
        ((2, 6, 9), (3, 3), (2, 1), (0, 2)),
        ((4, 5, 4), (1, 1), (1, 1), (0, 0)),
        ((2, 5, 6), (1, 2), (2, 3), (0, 0)),
        ((1, 3, 3), (3, 2), (1, 1), (0, 0)),
        ((9, 12, 12), (2, 4), (1, 3), (2, 0)),
    ],
)
def test_convolutions_agree_with_torch(images, window, stride, padding, channels, outputs, shared, dtype):
    number, height, width = images
    narrow = channels % 16 != 0
    if narrow and channels * window[0] * window[1] > 64:
        pytest.skip("too many numbers in a patch of few channels")
    inputs = torch.randn(2, number, channels, height, width, dtype=dtype)
    weights = torch.randn(*[2] * (not shared), outputs, channels, *window, dtype=dtype)
    bias = torch.randn(*weights.shape[:-3], dtype=dtype)
    assert kernels.takes(inputs, weights, stride, padding)
    assert kernels.takes(inputs, weights, stride, padding, by_inputs=True) == (not narrow)
    found = kernels.convolution(inputs, weights, bias, stride, padding)
    slope = torch.randn_like(found)
    wanted = (not narrow, True, True)
    derivatives = kernels.convolution_backward(slope, inputs, weights, stride, padding, wanted)
    expected = alone(inputs, weights, bias, slope, stride, padding)
    assert (derivatives[0] is None) == narrow
    for ours, theirs in zip((found, *derivatives), expected, strict=True):
        if ours is not None:
            assert ours.shape == theirs.shape
            assert ours.dtype == dtype
            scale = theirs.abs().max().item()
            assert (ours.double() - theirs).abs().max().item() <= (
                1e-14 if dtype == torch.float64 else 1e-5
            ) * scale
    without = kernels.convolution(inputs, weights, None, stride, padding)
    shift = bias[..., None, None] if shared else bias[:, None, :, None, None]
    torch.testing.assert_close(without + shift, found, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 processors")
@pytest.mark.parametrize("processor", ["x86-64-v2", "x86-64-v3"])
def test_narrower_vectors_agree_too(fresh, monkeypatch, processor):
    if processor == "x86-64-v3" and not {"avx2", "fma"} <= set(kernels._processor().split()):
        pytest.skip("this processor has no AVX2")
    flags = [flag for flag in kernels.FLAGS if flag != kernels.NATIVE]
    monkeypatch.setattr(kernels, "FLAGS", (*flags, f"-march={processor}"))
    for dtype in (torch.float32, torch.float64):
        for shared in (False, True):
            for channels, outputs in ((32, 64), (48, 16), (16, 5), (2, 48), (7, 32)):
                for images, window, stride, padding in (
                    ((5, 7, 7), (3, 3), (2, 2), (1, 1)),
                    ((6, 12, 12), (1, 3), (1, 1), (0, 1)),
                ):
                    test_convolutions_agree_with_torch(
                        images, window, stride, padding, channels, outputs, shared, dtype
                    )


def test_derivatives_that_are_not_wanted_are_left_out():
    inputs, weights = torch.randn(2, 3, 16, 5, 5), torch.randn(2, 4, 16, 3, 3)
    slope = torch.randn(2, 3, 4, 5, 5)
    every = kernels.convolution_backward(slope, inputs, weights, (1, 1), (1, 1), (True, True, True))
    for wanted in [(True, False, False), (False, True, False), (False, False, True)]:
        found = kernels.convolution_backward(slope, inputs, weights, (1, 1), (1, 1), wanted)
        assert [each is not None for each in found] == [*wanted]
        for one, other, want in zip(found, every, wanted):
            assert not want or torch.equal(one, other)


@pytest.mark.parametrize(
    ("inputs", "weights", "dtype", "taken"),
    [
        ((2, 3, 16, 5, 5), (4, 16, 3, 3), torch.float32, True),
        ((2, 3, 16, 5, 5), (4, 16, 3, 3), torch.bfloat16, False),
        ((2, 3, 20, 5, 5), (16, 20, 3, 3), torch.float32, False),  # vectors do not divide the channels
        ((2, 3, 3, 5, 5), (20, 3, 3, 3), torch.float32, False),  # nor the outputs
        ((2, 50, 16, 5, 5), (4, 16, 3, 3), torch.float32, False),  # many pixels: torch is as fast
    ],
)
def test_which_convolutions_are_taken(inputs, weights, dtype, taken):
    inputs, weights = torch.empty(inputs, dtype=dtype), torch.empty(weights, dtype=dtype)
    assert kernels.takes(inputs, weights, (1, 1), (1, 1)) == taken


@POOL
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_blocks_of_a_stack_of_tasks(pool, shared):
    inputs = torch.randn(3, 4, 5, 6, 7, dtype=torch.float64)
    vectors = [affine(5) for _ in range(3)]
    gamma, beta = vectors[0] if shared else map(torch.stack, zip(*vectors))
    outputs, *kept = norm_relu_pool(inputs, gamma, beta, EPS, pool)
    slope = torch.randn_like(outputs)
    found = [outputs, *norm_relu_pool_backward(slope, outputs, *kept, gamma, pool)]
    for task, own in enumerate(vectors):
        _, expected = both(inputs[task], *(vectors[0] if shared else own), pool, slope[task])
        assert_equal([each[task] for each in found], expected, 1e-12)


# --- threads and memory -----------------------------------------------------------------------------


def everything():
    """What each kernel finds for a stack of seven tasks, wide and narrow, with weights of each and of all."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    found = []
    for channels, outputs in ((16, 5), (16, 32), (1, 16)):
        inputs = draw(7, 3, channels, 9, 8)
        for weights, bias in (
            (draw(7, outputs, channels, 3, 3), draw(7, outputs)),
            (draw(outputs, channels, 3, 3), draw(outputs)),
        ):
            slope = kernels.convolution(inputs, weights, bias, (2, 2), (1, 1))
            wanted = (channels == 16, True, True)
            found += [slope, *kernels.convolution_backward(slope, inputs, weights, (2, 2), (1, 1), wanted)]
    for pool in (False, True):
        inputs, gamma, beta = draw(7, 3, 5, 9, 8), draw(7, 5), draw(5)
        outputs, *kept = norm_relu_pool(inputs, gamma, beta, EPS, pool)
        found += [outputs, *norm_relu_pool_backward(outputs, outputs, *kept, gamma, pool)]
    lefts, rights = [draw(90, 100), draw(7, 3)], [draw(7, 90, 100), draw(7, 3)]
    found += [*kernels.sums(rights), *kernels.subtract(lefts, rights, 0.3)]
    return [each for each in found if each is not None]


def assert_same(found, expected):
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5, 9])
def test_tasks_shared_out_give_the_same_bits(threads):
    expected = everything()
    memory = kernels.Memory()
    with kernels.sharing(threads, memory):
        for _ in range(20):
            assert_same(everything(), expected)
    assert_same(everything(), expected)


def test_several_threads_share_tasks_out_at_once():
    expected = everything()

    def work(number):
        with kernels.sharing(3, kernels.Memory()):
            for _ in range(20):
                assert_same(everything(), expected)
        return number

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(work, range(8))] == [*range(8)]


def test_a_child_process_shares_tasks_out_among_threads_of_its_own():
    code = """
import os, sys, torch
from fomaml.engines.cpu import kernels
inputs, weights = torch.randn(6, 2, 16, 9, 9), torch.randn(4, 16, 3, 3)
expected = kernels.convolution(inputs, weights, None, (1, 1), (1, 1))
def check():
    with kernels.sharing(2, kernels.Memory()):
        for _ in range(50):
            assert torch.equal(kernels.convolution(inputs, weights, None, (1, 1), (1, 1)), expected)
check()
child = os.fork()
check()
if not child:
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, env=environment)


def test_the_threads_are_forgotten_after_an_error():
    for _ in range(2):
        with pytest.raises(ValueError), kernels.sharing(2, kernels.Memory()):
            raise ValueError
        assert kernels._own.memory is None


def test_memory_comes_back_when_a_tensor_and_its_views_are_gone():
    memory = kernels.Memory()
    first = memory.empty((3, 4), torch.float32)
    second = memory.empty((4, 3), torch.float32)
    assert first.shape == (3, 4) and second.shape == (4, 3) and first.is_contiguous()
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
    place, view = first.data_ptr(), first[1:].t()
    assert second.data_ptr() != place
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    del first
    third = memory.empty((2, 6), torch.float32)
    assert third.data_ptr() != place  # the view still holds it
    third.fill_(3)
    assert (view == 1).all()
    del view
    assert memory.empty((12,), torch.float32).data_ptr() == place
    assert memory.empty((6,), torch.float64).data_ptr() == place  # as many bytes
    assert memory.empty((13,), torch.float32).data_ptr() != place


def test_what_is_lent_outlives_the_memory():
    memory = kernels.Memory()
    tensor = memory.empty((1000,), torch.float64).fill_(7)
    gone = weakref.ref(memory)
    del memory
    assert gone() is None and (tensor == 7).all()


# --- all parameters at once -------------------------------------------------------------------------


def stacks(dtype=torch.float64):
    """(tasks, ...) in several orders of memory."""
    weights = torch.randn(3, 4, 2, 5, 6, dtype=dtype)
    return [weights, weights.movedim(2, -1).contiguous().movedim(-1, 2), *torch.randn(2, 3, 7, dtype=dtype)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sums_over_tasks(dtype):
    tensors = stacks(dtype)
    for own in (tensors, [*tensors, torch.randn(7, 3, dtype=dtype).t()], [torch.randn(3, dtype=dtype)]):
        for found, tensor in zip(kernels.sums(own), own, strict=True):
            torch.testing.assert_close(found, tensor.sum(0))
    if dtype in kernels.NAMES:
        assert kernels.sums(tensors)[1].stride() == tensors[1].stride()[1:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_subtracts_from_tensors_of_each_task_or_of_all(dtype):
    rights = stacks(dtype)
    own = [torch.randn_like(right) for right in rights]
    every = [torch.randn_like(right[0]) for right in rights]
    contiguous = [each.contiguous() for each in every]  # in another order than the right one
    for lefts in (own, every, [own[0], every[1], every[2], own[3]], contiguous):
        for found, left, right in zip(kernels.subtract(lefts, rights, 0.3), lefts, rights, strict=True):
            torch.testing.assert_close(found, torch.sub(left, right, alpha=0.3))
