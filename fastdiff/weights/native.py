"""The pass over activations as compiled C++, where there is a compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from ..cache import cache_folder

_SOURCE = Path(__file__).with_name("activations.cpp")
# Not -ffast-math: linked, it would change how the whole process treats denormal numbers.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-std=c++17", "-fPIC")
_TIMEOUT_S = 120


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """The compiled pass; None without a compiler, or where what it makes cannot be loaded here.

    Compiled once a machine and version; kept in the user's cache folder where that can be written.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    path = cache_folder() / f"activations-{_key(compiler)}.so"
    try:
        return _bind(path)
    except OSError:
        pass  # not there, or not whole
    try:
        with tempfile.TemporaryDirectory() as scratch:
            built = _compile(compiler, Path(scratch))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f".{path.name}.{os.getpid()}")
                shutil.copy(built, partial)
                partial.replace(path)
                return _bind(path)
            except OSError:
                return _bind(built)  # loaded, the file is needed no more
    except (OSError, subprocess.SubprocessError):
        return None


def _compile(compiler: str, folder: Path) -> Path:
    compiled, library = folder / "activations.o", folder / "activations.so"
    steps = (
        [*compiler.split(), *_FLAGS, "-fopenmp", "-c", str(_SOURCE), "-o", str(compiled)],
        [*compiler.split(), "-shared", str(compiled), "-o", str(library), _openmp()],
    )
    for step in steps:
        subprocess.run(step, check=True, capture_output=True, timeout=_TIMEOUT_S)
    return library


def _openmp() -> str:
    """The library of threads that PyTorch came with; linked by its own name, it is not loaded a second time."""
    root = Path(torch.__file__).parent
    found = sorted([*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")])
    return str(found[0]) if found else "-fopenmp"


def _bind(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("bfloat16", "float32"):
        function = getattr(library, f"fastdiff_quantize_{name}")
        function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 6 + [ctypes.c_void_p]
        function.restype = None
    return library


def _key(compiler: str) -> str:
    parts = (_SOURCE.read_text(encoding="utf-8"), _FLAGS, compiler, torch.__version__, _processor())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What the compiler's -march=native depends on: a home folder may be shared by unlike machines."""
    return f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
