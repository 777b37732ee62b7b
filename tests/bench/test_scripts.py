"""The scripts of `benchmarks/` find what they import: most of them need a GPU or hours to run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_every_script_imports():
    pytest.importorskip("pytest_benchmark", reason="benchmarks need it")
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in ("conftest", "cold_start"))
    assert "gpu_probes" in names
    code = f"import importlib; [importlib.import_module(name) for name in {names}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
