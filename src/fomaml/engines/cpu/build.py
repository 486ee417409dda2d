"""The library of kernels: built with the machine's C++ compiler at first use, kept in the user's cache folder."""

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

from fomaml.files import user_cache

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("norm_relu_pool.cpp", "convolution.cpp", "vectors.cpp")]
HEADERS = [FOLDER / name for name in ("crew.h", "patches.h", "tiles.h")]
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
FAST = ("-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
FLAGS = (*FAST, NATIVE, "-std=c++17", "-shared", "-fPIC", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
NO_COMPILER = "there is no C++ compiler on this machine"
TENSOR, TENSORS = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
NUMBER, NUMBERS = ctypes.c_longlong, ctypes.POINTER(ctypes.c_longlong)
ARGUMENTS = {
    "forward": [*[TENSOR] * 7, NUMBERS, ctypes.c_double],
    "backward": [*[TENSOR] * 10, NUMBERS],
    "convolve": [*[TENSOR] * 4, NUMBERS],
    "convolve_backward": [*[TENSOR] * 6, NUMBERS],
    "sums": [*[TENSORS] * 2, NUMBERS, NUMBER, NUMBER],
    "subtract": [*[TENSORS] * 3, NUMBERS, NUMBERS, NUMBER, NUMBER, ctypes.c_double],
}
DIGEST = hashlib.sha256().digest_size


def compiler() -> list[str]:
    """The command of the machine's C++ compiler, empty if there is none: $CXX, or the first of the usual names."""
    return shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, COMPILERS))[:1]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, built where they are not in the cache for this source, compiler, its version and processor.

    Raises:
        RuntimeError: no compiler, or it fails; the message says why.
    """
    command = compiler()
    if not command:
        raise RuntimeError(NO_COMPILER)
    facts = [
        *(source.read_text(encoding="utf-8") for source in (*SOURCES, *HEADERS)),
        *command,
        _version(command),
        *FLAGS,
        platform.machine(),
        _processor(),
    ]
    name = f"kernels-{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:16]}.so"
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
            return _declared(ctypes.CDLL(str(path)))
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"{command[0]} made something that does not load: {error}") from None
    raise RuntimeError(f"the kernels could not be kept: {reason}")


def _declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    """The same kernels, which now know the types of their arguments."""
    for name, types in ARGUMENTS.items():
        for dtype in ("float32", "float64"):
            kernel = getattr(kernels, f"{name}_{dtype}")
            kernel.argtypes, kernel.restype = types, None
    kernels.use_threads.argtypes, kernels.use_threads.restype = [ctypes.c_longlong], None
    return kernels


def _version(command: list[str]) -> str:
    """What the compiler says of itself: another version makes other code of the same source."""
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    except OSError:  # which is told when it builds
        return ""


def _build(command: list[str], path: Path) -> None:
    """Build the kernels in a file of its own beside `path` and move it there whole, its digest at the end."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        temporary = Path(folder) / path.name
        try:
            build = [*command, *FLAGS, "-o", str(temporary), *map(str, SOURCES)]
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
