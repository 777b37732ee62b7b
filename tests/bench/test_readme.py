"""The README's numbers are those of the committed results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.bench.ladder import rungs_for
from fastdiff.bench.plot import draw
from fastdiff.bench.run import run_ladder
from fastdiff.bench.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def run_script(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, root / "benchmarks" / "readme.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path) -> Path:
    """README, benchmarks and package, with no results yet."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results"))
    (tmp_path / "benchmarks" / "results").mkdir()
    shutil.copytree(ROOT / "fastdiff", tmp_path / "fastdiff", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_numbers_come_from_the_results():
    checked = run_script(ROOT, "--check")
    assert checked.returncode == 0, checked.stderr


def test_a_ladder_gets_its_table_and_picture(copy):
    settings = Settings(
        model=fastdiff.EMBEDDED_CHECKPOINT, size=(64, 64), measures=("step",), dtype=torch.float32, rounds=2
    )
    folder = copy / "benchmarks" / "results"
    path = folder / "ladder_cpu_2026-01-02.json"
    results = run_ladder(settings, rungs_for(settings, ["channels-last"]), path, "embedded", bar=False)
    draw(results, path.with_suffix(".png"))
    older = {**results, "date": "2026-01-01"}
    (folder / "ladder_cpu_2026-01-01.json").write_text(json.dumps(older))

    assert run_script(copy, "--check").returncode != 0
    assert run_script(copy).returncode == 0
    assert run_script(copy, "--check").returncode == 0
    text = (copy / "README.md").read_text()
    assert "](benchmarks/results/ladder_cpu_2026-01-02.png)" in text and "+ channels_last |" in text
    assert "2026-01-01" not in text

    median = results["rungs"]["channels-last"]["ratios"]["step"]["sdpa"]["median"]
    (copy / "README.md").write_text(text.replace(f"| {median:.2f} (", "| 9.99 ("))
    wrong = run_script(copy, "--check")
    assert wrong.returncode != 0 and "differs" in wrong.stderr
