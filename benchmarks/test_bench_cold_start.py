"""Whole processes, from the start to the first picture: stock eager, fast compiled with saved code, and without.

On an otherwise idle machine:

    pytest benchmarks/test_bench_cold_start.py --benchmark-json=results.json

The small checkpoint draws a picture of 4 steps; the full-size UNet, filled with small numbers, takes one step at
256x256 in bfloat16. The process without saved code runs once, as it compiles for minutes; it saves the code for the
others. Each process gets an empty folder for what inductor compiles.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROUNDS = {"embedded": 5, "sdxl-random": 3}


def start(folder: Path, *arguments) -> dict:
    """Run one process; returns the seconds of its stages."""
    script = Path(__file__).with_name("cold_start.py")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    model, who, *path = map(str, arguments)
    command = [sys.executable, str(script), model, who, str(time.time()), *path]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", list(ROUNDS))
def test_first_picture(benchmark, tmp_path, model):
    code = tmp_path / "compiled"
    without = start(tmp_path / "without", model, "fast", code)
    runs: dict[str, list[dict]] = {"stock": [], "compiled": []}

    def run(who: str, *path) -> None:
        runs[who].append(start(tmp_path / f"{who}-{len(runs[who])}", model, who, *path))

    benchmark.group = f"from the start of a process to its first picture, {model}"
    benchmark.pedantic(lambda: run("compiled", code), setup=lambda: run("stock"), rounds=ROUNDS[model])
    medians = {
        who: {name: round(statistics.median(each[name] for each in stages), 3) for name in stages[0]}
        for who, stages in runs.items()
    }
    stock, compiled = medians["stock"], medians["compiled"]
    pairs = list(zip(runs["compiled"], runs["stock"], strict=True))
    benchmark.extra_info.update(
        seconds={**medians, "compiled without saved code, once": without},
        file_bytes=code.stat().st_size,
        total_over_stock=round(statistics.median(ours["total"] / peer["total"] for ours, peer in pairs), 3),
        # The first picture and the compiled code that it needs, against the first picture of stock.
        first_picture_over_stock=round(
            (compiled["compiled code"] + compiled["first picture"]) / stock["first picture"], 3
        ),
        without_over_with=round(without["total"] / compiled["total"], 2),
    )
