"""Builds and loads the CPU op at first use, once per machine, without torch headers.

The library has a plain C interface, so no torch release is baked in. It is compiled for this CPU and kept in the
user's cache under a name that covers sources, compiler and CPU. It is linked without an OpenMP runtime: its calls
bind to the one torch has already loaded, so it shares torch's (and vLLM's) threads, their count and their cores.
`load_torch_op` builds the second, small library that `direct_calls` connects layers to. It does need torch's headers,
so its name covers the torch release too.

Environment, all of this op's:
    FLORA_NATIVE  auto (default): use the op if it can be built, else torch, said once
                  0: torch     1: the op, or an error
    CXX           the C++ compiler, default the first of c++, g++, clang++ found
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from flora_vllm.environment import cache_root
from flora_vllm.errors import ConfigError
from flora_vllm.ops.measured import cpu_name

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
TORCH_OP = SOURCES / "torch_op.cpp"
_COMPILE = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-Wno-psabi")
_TORCH = Path(torch.__path__[0])
_COMPILE_TORCH = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-w",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    *(f"-I{_TORCH / folder}" for folder in ("include", "include/torch/csrc/api/include")),
)


def why_unavailable() -> str | None:
    """Why the op cannot run here, or None. Raises ConfigError if FLORA_NATIVE=1 asks for it all the same."""
    wish = os.environ.get("FLORA_NATIVE", "auto")
    if wish not in ("auto", "0", "1"):
        raise ConfigError(f"FLORA_NATIVE={wish!r} is not allowed; use auto, 0 or 1")
    if wish == "0":
        return "FLORA_NATIVE=0"
    _, reason = _load("native")
    if reason is not None and wish == "1":
        raise ConfigError(f"FLORA_NATIVE=1, but {reason}")
    return reason


def load_library(arch: str = "native") -> ctypes.CDLL:
    """The op compiled with -march=`arch`. Raises ConfigError with the compiler's words if that fails."""
    library, reason = _load(arch)
    if library is None:
        raise ConfigError(f"the native op is not available: {reason}")
    return library


def load_torch_op() -> ctypes.CDLL:
    """The library that takes torch's calls (csrc/torch_op.cpp). Raises ConfigError or OSError if it cannot be built."""
    compiler = _compiler()
    parts = (_run(compiler, "--version"), torch.__version__, *_COMPILE_TORCH, TORCH_OP.read_text())
    folder = cache_root() / "native" / _hash(parts)
    libraries = (f"-L{_TORCH / 'lib'}", "-lc10", "-ltorch_cpu")
    return ctypes.CDLL(str(_built(compiler, (*_COMPILE_TORCH, str(TORCH_OP)), folder, "torch_op.so", libraries)))


def build_name() -> str:
    """Name of this machine's build; a change of sources, compiler or CPU changes it."""
    return f"native {_digest(_compiler(), 'native')}"


@cache
def _load(arch: str) -> tuple[ctypes.CDLL | None, str | None]:
    try:
        compiler = _compiler()
        folder = cache_root() / "native" / _digest(compiler, arch)
        flags = (*_COMPILE, f"-march={arch}", str(SOURCES / "linear.cpp"))
        try:
            return ctypes.CDLL(str(_built(compiler, flags, folder, "flora.so", ()))), None
        except OSError as error:
            if "GOMP" not in str(error) and "omp_" not in str(error):
                raise
            logger.warning("no OpenMP runtime is loaded globally; the native op brings its own threads")
            return ctypes.CDLL(str(_built(compiler, flags, folder, "flora-gomp.so", ("-lgomp",)))), None
    except (OSError, ConfigError) as error:
        return None, str(error)


def _built(compiler: str, flags: Sequence[str], folder: Path, name: str, libraries: Sequence[str]) -> Path:
    """The library's path; compiles it unless another process or an earlier run has."""
    target = folder / name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Engine workers start together: one compiles, the others wait for it.
    with _locked(folder / "lock"):
        if target.exists():
            return target
        logger.info("compiling %s of the native op with %s (once on this machine)", name, compiler)
        mine = folder / f"{os.getpid()}"
        parts = [Path(f"{mine}.o"), Path(f"{mine}.so")]
        try:
            _run(compiler, *flags, "-c", "-o", str(parts[0]))
            _run(compiler, "-shared", str(parts[0]), "-o", str(parts[1]), *libraries)
            parts[1].replace(target)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)
    return target


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _compiler() -> str:
    wish = os.environ.get("CXX")
    for name in (wish,) if wish else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    raise ConfigError(f"there is no C++ compiler ({'CXX=' + wish if wish else 'c++, g++ or clang++'})")


@cache
def _digest(compiler: str, arch: str) -> str:
    parts = [_run(compiler, "--version"), cpu_name() if arch == "native" else arch, *_COMPILE]
    files = [file for file in sorted(SOURCES.iterdir()) if file.suffix in (".h", ".cpp") and file != TORCH_OP]
    return _hash([*parts, *(file.name + file.read_text() for file in files)])


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        lines = "\n".join((done.stderr or done.stdout).splitlines()[:20])
        raise ConfigError(f"`{' '.join(command)}` ended with {done.returncode}:\n{lines}")
    return done.stdout
