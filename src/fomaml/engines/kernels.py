"""Fused kernels for a CPU: built with the machine's C++ compiler at first use, kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fomaml.data.download import user_cache

SOURCE = Path(__file__).with_name("norm_relu_pool.cpp")
FAST = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
FLAGS = (*FAST, "-std=c++17", "-shared", "-fPIC")
NAMES = {torch.float32: "float32", torch.float64: "float64"}
COMPILERS = ("c++", "g++", "clang++")
DIGEST = hashlib.sha256().digest_size


def compiler() -> list[str]:
    """The command of the machine's C++ compiler, empty if there is none: $CXX, or the first of the usual names."""
    return shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, COMPILERS))[:1]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, built where they are not in the cache for this source, compiler and processor.

    Raises:
        RuntimeError: no compiler, or it fails; the message says why.
    """
    command = compiler()
    if not command:
        raise RuntimeError("there is no C++ compiler on this machine")
    facts = [SOURCE.read_text(encoding="utf-8"), *command, *FLAGS, platform.machine(), _processor()]
    name = f"norm_relu_pool-{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:16]}.so"
    for folder in (user_cache(), Path(tempfile.gettempdir()) / f"fomaml-{os.getuid()}"):
        path = folder / name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                raise PermissionError(f"{folder} belongs to somebody else")
            kept = path.read_bytes() if path.exists() else b""
            code = kept[:-DIGEST]
            if not kept or hashlib.sha256(code).digest() != kept[-DIGEST:]:  # none yet, or a damaged one
                _build(command, path)
        except OSError as error:  # a folder that takes no files: the next one
            reason = error
            continue
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise RuntimeError(f"{command[0]} made something that does not load: {error}") from None
    raise RuntimeError(f"the kernels could not be kept: {reason}")


def _build(command: list[str], path: Path) -> None:
    """Build the kernels in a file of its own beside `path` and move it there whole, its digest at the end."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        temporary = Path(folder) / path.name
        try:
            build = [*command, *FLAGS, "-o", str(temporary), str(SOURCE)]
            done = subprocess.run(build, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"{command[0]} failed: {error}") from None
        if done.returncode:
            raise RuntimeError(
                f"{command[0]} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}"
            )
        code = temporary.read_bytes()
        temporary.write_bytes(code + hashlib.sha256(code).digest())  # the loader does not mind what follows
        os.replace(temporary, path)


def _processor() -> str:
    """What the code is built for: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def channels_last(images: Tensor) -> Tensor:
    """The images in that order of memory; with one channel `contiguous` keeps strides that convolutions take for the
    other.
    """
    return images.to(memory_format=torch.channels_last)


def norm_relu_pool(
    inputs: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, pool: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Batch norm by the statistics of the batch (Ioffe & Szegedy 2015), ReLU and, with `pool`, a 2×2 max-pool.

    inputs: (examples, channels, height, width), float32 or float64. Returns the outputs, channels-last, and what
    `norm_relu_pool_backward` wants: the inputs channels-last, those that won their windows, mean, 1 / deviation.
    """
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = inputs.shape
    size = (images, channels, height // 2, width // 2) if pool else inputs.shape
    outputs = torch.empty(size, dtype=inputs.dtype, memory_format=torch.channels_last)
    won = torch.empty_like(outputs) if pool else outputs
    mean, deviation = inputs.new_empty(channels), inputs.new_empty(channels)
    gamma, beta = _flat(gamma), _flat(beta)  # held until the kernel is done: it gets bare addresses
    pointers = _pointers(inputs, gamma, beta, outputs, won, mean, deviation)
    sizes = _sizes(images, height, width, channels)
    kernel = getattr(library(), f"forward_{NAMES[inputs.dtype]}")
    kernel(*pointers, *sizes, ctypes.c_double(eps), ctypes.c_int(pool))
    return outputs, inputs, won, mean, deviation


def norm_relu_pool_backward(
    slope: Tensor,
    outputs: Tensor,
    inputs: Tensor,
    won: Tensor,
    mean: Tensor,
    deviation: Tensor,
    gamma: Tensor | None,
    pool: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives by inputs, γ and β, given those by the outputs; `overwrite`: into the place of the inputs."""
    slope = slope.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = inputs.shape
    by_inputs = inputs if overwrite else torch.empty_like(inputs)
    by_gamma, by_beta = torch.empty_like(mean), torch.empty_like(mean)
    gamma = _flat(gamma)
    pointers = _pointers(slope, inputs, outputs, won, gamma, mean, deviation, by_inputs, by_gamma, by_beta)
    kernel = getattr(library(), f"backward_{NAMES[inputs.dtype]}")
    kernel(*pointers, *_sizes(images, height, width, channels), ctypes.c_int(pool))
    return by_inputs, by_gamma, by_beta


def _flat(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def _sizes(*sizes: int) -> list[ctypes.c_longlong]:
    return [ctypes.c_longlong(size) for size in sizes]
