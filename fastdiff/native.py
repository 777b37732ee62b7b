"""C++ of ours, compiled where it runs, where there is a compiler."""

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

from .cache import cache_folder

# Not -ffast-math: linked, it would change how the whole process treats denormal numbers.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-std=c++17", "-fPIC")
_TIMEOUT_S = 120


@functools.cache
def load_library(source: Path) -> ctypes.CDLL | None:
    """What a file of C++ compiles to; None without a compiler, or where what it makes cannot be loaded here.

    Compiled once a machine and version; kept in the user's cache folder where that can be written. The file needs
    none of PyTorch's headers, and has its threads from OpenMP.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    path = cache_folder() / f"{source.stem}-{_key(source, compiler)}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        pass  # not there, or not whole
    try:
        with tempfile.TemporaryDirectory() as scratch:
            built = _compile(source, compiler, Path(scratch))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f".{path.name}.{os.getpid()}")
                shutil.copy(built, partial)
                partial.replace(path)
                return ctypes.CDLL(str(path))
            except OSError:
                return ctypes.CDLL(str(built))  # loaded, the file is needed no more
    except (OSError, subprocess.SubprocessError):
        return None


def _compile(source: Path, compiler: str, folder: Path) -> Path:
    compiled, library = folder / f"{source.stem}.o", folder / f"{source.stem}.so"
    steps = (
        [*compiler.split(), *_FLAGS, "-fopenmp", "-c", str(source), "-o", str(compiled)],
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


def _key(source: Path, compiler: str) -> str:
    parts = (source.read_text(encoding="utf-8"), _FLAGS, compiler, torch.__version__, _processor())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What the compiler's -march=native depends on: a home folder may be shared by unlike machines."""
    return f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
