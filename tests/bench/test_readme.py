"""The tables of README and `benchmarks/README.md` are those of the committed results, by chip."""

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


def rows(text: str, begins: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {begins}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_numbers_come_from_the_results():
    checked = run_script(ROOT, "--check")
    assert checked.returncode == 0, checked.stderr


def test_the_readme_is_read_in_a_minute():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for target in [part.partition(")")[0] for part in text.split("](")[1:]]:
        assert target.startswith("https://") or (ROOT / target.partition("#")[0]).exists(), target


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
    tables = copy / "benchmarks" / "README.md"
    text = tables.read_text()
    assert "](results/ladder_cpu_2026-01-02.png)" in text and "+ channels_last |" in text
    assert "2026-01-01" not in text
    # The tiny model says nothing about SDXL: the README's table has no row of it.
    assert not rows((copy / "README.md").read_text(), "UNet step")

    median = results["rungs"]["channels-last"]["ratios"]["step"]["sdpa"]["median"]
    tables.write_text(text.replace(f"| {median:.2f} (", "| 9.99 ("))
    wrong = run_script(copy, "--check")
    assert wrong.returncode != 0 and "differs" in wrong.stderr


def ladder(ratio: float, date: str, **machine) -> dict:
    """A ladder's result of full size with one ratio to stock, as `fastdiff bench --json` writes it."""
    spread = {"median": ratio, "min": ratio - 0.1, "max": ratio + 0.1, "all": [ratio]}
    versions = {"torch": "2.13.0", "diffusers": "0.42.1", "torchao": "0.18.0"}
    rung = {
        "label": 'fastdiff "balanced"',
        "kind": "fastdiff",
        "times": {"step": spread},
        "ratios": {"step": {"sdpa": spread}},
        "errors": {"step": 0.01},
    }
    return {
        "settings": {"model": "sdxl-random", "size": [256, 256], "steps": 20, "batch": 1, "measures": ["step"],
                     "dtype": "bfloat16"},
        "machine": {"threads": 2, "versions": versions, **machine},
        "date": date,
        "rungs": {"balanced": rung},
    }


def test_each_kind_of_machine_is_a_column_and_each_chip_a_chapter(copy):
    folder = copy / "benchmarks" / "results"
    intel, amd = {"cpu": "Intel Xeon", "amx_bf16": True}, {"cpu": "AMD EPYC", "amx_bf16": False, "capability": "AVX512"}
    for name, result in {
        "ladder_cpu_2026-01-01": ladder(1.5, "2026-01-01", **intel),
        "ladder_cpu_2026-01-02": ladder(1.6, "2026-01-02", **intel),
        "ladder_cpu_2026-01-03": ladder(1.2, "2026-01-03", **amd),
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    assert run_script(copy).returncode == 0
    [cells] = rows((copy / "README.md").read_text(), "UNet step, 256x256: default, beside stock")
    assert cells[1:] == ["1.60 (1.50-1.70)", "1.20 (1.10-1.30)", "not measured yet"]
    text = (copy / "benchmarks" / "README.md").read_text()
    assert text.index("## AMD EPYC (CPU with AVX512, no AMX)") < text.index("## Intel Xeon (CPU with AMX)")

    # A chip of the same name that has less.
    old = ladder(1.1, "2026-01-04", **{**amd, "capability": "AVX2"})
    (folder / "ladder_cpu_old_2026-01-04.json").write_text(json.dumps(old))
    assert run_script(copy).returncode == 0
    [cells] = rows((copy / "README.md").read_text(), "UNet step, 256x256: default, beside stock")
    assert cells[1:] == ["1.60 (1.50-1.70)", "1.20 (1.10-1.30)", "1.10 (1.00-1.20)", "not measured yet"]
    chapters = (copy / "benchmarks" / "README.md").read_text().split("\n## ")[1:]
    assert [chapter.count("| 1.10 (1.00-1.20) |") for chapter in chapters] == [1, 0, 0]

    # Where there is no compiler, figures are for the long tables.
    bare = ladder(1.15, "2026-01-05", **{**amd, "cpp_compiler": False})
    (folder / "ladder_cpu_bare_2026-01-05.json").write_text(json.dumps(bare))
    assert run_script(copy).returncode == 0
    [cells] = rows((copy / "README.md").read_text(), "UNet step, 256x256: default, beside stock")
    assert cells[1:] == ["1.60 (1.50-1.70)", "1.20 (1.10-1.30)", "1.10 (1.00-1.20)", "not measured yet"]
    assert "256x256, batch 1 with guidance, without a C++ compiler**" in (copy / "benchmarks" / "README.md").read_text()

    gpu = ladder(2.5, "2026-01-04", cpu="Intel Xeon", amx_bf16=True, gpu="NVIDIA H100")
    (folder / "ladder_h100_2026-01-04.json").write_text(json.dumps(gpu))
    assert run_script(copy).returncode == 0
    [cells] = rows((copy / "README.md").read_text(), "UNet step, 256x256: default, beside stock")
    assert cells[1:] == ["1.60 (1.50-1.70)", "1.20 (1.10-1.30)", "1.10 (1.00-1.20)", "2.50 (2.40-2.60)"]
