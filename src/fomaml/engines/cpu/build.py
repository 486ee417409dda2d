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
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from fomaml.files import user_cache

FOLDER = Path(__file__).parent
# the longest first; of convolutions and of stacks of tensors apart, as not every network wants them
SOURCES = [FOLDER / name for name in ("norm_relu_pool.cpp", "crew.cpp")]
STACKED = [FOLDER / "convolution.cpp", *SOURCES, FOLDER / "vectors.cpp"]
PRODUCTS = [FOLDER / "products.cpp"]
HEADERS = [FOLDER / name for name in ("crew.h", "entries.h", "lanes.h", "patches.h", "tiles.h")]
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
}
STACKED_ARGUMENTS = ARGUMENTS | {
    "convolve": [*[TENSOR] * 4, NUMBERS],
    "convolve_backward": [*[TENSOR] * 6, NUMBERS],
    "sums": [*[TENSORS] * 2, NUMBERS, NUMBER, NUMBER],
    "subtract": [*[TENSORS] * 3, NUMBERS, NUMBERS, NUMBER, NUMBER, ctypes.c_double],
}
PRODUCT = {"product": [*[TENSOR] * 4, NUMBERS, *[ctypes.c_double] * 2]}
DTYPES = ("float32", "float64")
DIGEST = hashlib.sha256().digest_size


def compiler() -> list[str]:
    """The command of the machine's C++ compiler, empty if there is none: $CXX, or the first of the usual names."""
    return shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, COMPILERS))[:1]


def library(dtype: str = "float32", stacked: bool = True) -> ctypes.CDLL:
    """The kernels of a dtype, built where they are not in the cache for this source, compiler, its version and
    processor. Of one dtype, as those of both take twice the time.

    stacked: those of convolutions and of stacks of tensors too, which take longer than the others.

    Raises:
        RuntimeError: no compiler, or it fails; the message says why.
    """
    # all of them are more than enough
    if (found := _loaded.get((dtype, True)) or _loaded.get((dtype, stacked))) is not None:
        return found
    for key in ((dtype, True), (dtype, stacked)):
        if (begun := _begun.pop(key, None)) is not None:
            return _loaded.setdefault(key, begun.result())
    return _loaded.setdefault((dtype, stacked), _library(dtype, stacked))


_loaded: dict[tuple[str, bool], ctypes.CDLL] = {}
_begun: dict[tuple[str, bool], Future[ctypes.CDLL]] = {}


def begin(dtype: str, stacked: bool = True) -> None:
    """Have another thread build what `library` will be asked for, if this process has no kernels yet: the compiler runs
    while the caller traces, who goes first where there are too few cores.
    """
    if dtype in DTYPES and (dtype, stacked) not in _begun and not _loaded:
        aside = ThreadPoolExecutor(1, initializer=_step_back)
        _begun[dtype, stacked] = aside.submit(_library, dtype, stacked)
        aside.shutdown(wait=False)


def _step_back() -> None:
    """Lower the priority of this thread, on Linux, and of the processes that it starts."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _library(dtype: str, stacked: bool) -> ctypes.CDLL:
    files, functions = (STACKED, STACKED_ARGUMENTS) if stacked else (SOURCES, ARGUMENTS)
    kernels = _made("stacked" if stacked else "kernels", files, functions, dtype)
    kernels.use_threads.argtypes, kernels.use_threads.restype = [NUMBER], None
    return kernels


@functools.cache
def products(dtype: str) -> ctypes.CDLL:
    """The products of matrices of a dtype, as `library` the kernels."""
    return _made("products", PRODUCTS, PRODUCT, dtype)


def _made(kind: str, files: Sequence[Path], functions: dict[str, list], dtype: str) -> ctypes.CDLL:
    """What is made of these files, with the types of the arguments of its functions."""
    command = compiler()
    if not command:
        raise RuntimeError(NO_COMPILER)
    sources = (source.read_text(encoding="utf-8") for source in (*files, *HEADERS))
    options = [*FLAGS, f"-DONLY={dtype.removeprefix('float')}"]
    name = name_of(kind, [*sources, *command, *options, *machine()])
    path = kept(name, partial(_build, command, options, files))
    try:
        library = ctypes.CDLL(str(path))
        for function, types in functions.items():
            own = getattr(library, f"{function}_{dtype}")
            own.argtypes, own.restype = types, None
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{command[0]} made something that does not load: {error}") from None
    return library


def name_of(kind: str, facts: Iterable[str]) -> str:
    """The name of a file that depends on these facts."""
    return f"{kind}-{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:32]}.so"


def machine() -> list[str]:
    """What compiled code depends on beside its source: the compiler and its version, and the processor."""
    command = compiler()
    return [*command, _version(command), platform.machine(), _processor()]


def kept(name: str, build: Callable[[Path], None]) -> Path:
    """The file of this name in the user's cache folder, or where that takes no files in one of its own among the
    temporary files. Where it is not there, or not whole, it is built: `build(path)` writes it, with `sealed` content.

    Raises:
        NoFolder: no folder takes it. What `build` raises goes through.
    """
    for folder in (user_cache(), Path(tempfile.gettempdir()) / f"fomaml-{os.getuid()}"):
        path = folder / name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                raise PermissionError(f"{folder} belongs to somebody else")
            content = path.read_bytes() if path.exists() else b""
            if not content or sealed(content[:-DIGEST]) != content:  # none yet, or a damaged one
                build(path)
        except OSError as error:  # a folder that takes no files: the next one
            reason = error
            continue
        return path
    raise NoFolder(f"the kernels could not be kept: {reason}")


class NoFolder(RuntimeError):
    """No folder takes what was compiled."""


def keeps() -> bool:
    """Whether what is compiled is to be kept for other processes."""
    return os.environ.get("FOMAML_KEEP_COMPILED") != "0"


def sealed(code: bytes) -> bytes:
    """A library with its digest at the end; the loader does not mind what follows."""
    return code + hashlib.sha256(code).digest()


def _version(command: list[str]) -> str:
    """What the compiler says of itself: another version makes other code of the same source."""
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    except OSError:  # which is told when it builds
        return ""


def _build(command: list[str], options: list[str], files: Sequence[Path], path: Path) -> None:
    """Build a library of these files in one of its own beside `path` and move it there whole, its digest at the end."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        temporary = Path(folder) / path.name
        objects = [str(Path(folder) / f"{source.stem}.o") for source in files]
        parts = [[*command, *options, "-c", "-o", made, str(source)] for made, source in zip(objects, files)]
        with ThreadPoolExecutor(
            max_workers=os.cpu_count()
        ) as pool:  # side by side: half the time on two cores
            list(pool.map(_compile, parts))
        _compile([*command, *options, "-o", str(temporary), *objects])
        _placed(temporary, path)


def _placed(made: Path, path: Path) -> None:
    """Move a library to its place whole, its digest at the end."""
    made.write_bytes(sealed(made.read_bytes()))
    os.replace(made, path)


def compiled(command: Sequence[str], options: Sequence[str], text: str, path: Path) -> None:
    """Compile C++ into a library, moved to its place whole, its digest at the end."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        source, temporary = Path(folder) / "source.cpp", Path(folder) / path.name
        source.write_text(text, encoding="utf-8")
        _compile([*command, *options, "-o", str(temporary), str(source)])
        _placed(temporary, path)


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]} failed: {error}") from None
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}")


@functools.cache
def knows(command: tuple[str, ...], options: tuple[str, ...]) -> bool:
    """Whether the compiler knows these options."""
    check = [*command, *options, "-fsyntax-only", "-x", "c++", "-"]
    try:
        return subprocess.run(check, input="", capture_output=True, text=True).returncode == 0
    except OSError:
        return False


@functools.cache
def leaves_registers_empty() -> bool:
    """Whether the products of torch take half of each vector register: MKL's do on processors of AMD with AVX-512."""
    facts = processor_facts()
    own = facts.get("vendor_id") == "AuthenticAMD" and "avx512f" in facts.get("flags", "").split()
    return own and torch.backends.mkl.is_available()


def _processor() -> str:
    """What the code is built for: a cache folder may be shared by machines."""
    facts = processor_facts()
    found = facts.get("flags") or facts.get("Features")
    return platform.processor() if found is None else found


def processor_facts() -> dict[str, str]:
    """What Linux tells of the first processor, by name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    parts = (line.partition(":") for line in reversed(lines))
    return {name.strip(): value.strip() for name, _, value in parts}
