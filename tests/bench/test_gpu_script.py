"""`benchmarks/gpu.py`: what fails or is cut off costs itself alone, and the same command goes on with the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from support.embedded import load_fast

from fastdiff import EMBEDDED_CHECKPOINT
from fastdiff.bench.settings import Settings
from fastdiff.bench.workloads import workload

ROOT = Path(__file__).parents[2]
PARTS = ["device", "tiny", "headline"]


def command(folder: Path, *arguments: str) -> list:
    script = ROOT / "benchmarks" / "gpu.py"
    return [sys.executable, script, "--dry-run", "--out", folder, "--parts", *PARTS, *arguments]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(folder, *arguments), capture_output=True, text=True, env=environment)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for path in folder.glob("gpu_dry_*.jsonl") for line in path.read_text().splitlines()]


def test_dry_run_survives_failures_and_being_killed_and_resumes(tmp_path):
    first = subprocess.Popen(
        command(tmp_path, "--break", "tiny=raise", "headline=hang"), start_new_session=True, stdout=subprocess.DEVNULL
    )
    while not any(line.get("figure") == "before it hangs" for line in lines(tmp_path)):
        assert first.poll() is None
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    states = {line["part"]: (line["state"], line["why"]) for line in lines(tmp_path) if "state" in line}
    assert states == {"device": ("done", ""), "tiny": ("failed", "RuntimeError: made to raise")}
    # What there was before it was killed is on the disk.
    (saved,) = [line for line in lines(tmp_path) if line.get("figure") == "before it hangs"]
    before = lines(tmp_path)

    second = run(tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    after = lines(tmp_path)
    assert after[: len(before)] == before and saved in after
    added = after[len(before) :]
    assert {line["part"] for line in added} == {"tiny", "headline"}, "what was done is not done again"
    figures = {line["figure"]: line["value"] for line in added if line["part"] == "headline" and "value" in line}
    for preset in ("exact", "balanced"):
        for measure in ("picture", "step", "vae"):
            for name in (f"{preset}: {measure}", f"{preset} without graphs: {measure}"):
                assert figures[name]["ratio"]["median"] > 0 and len(figures[name]["stock"]["all"]) == 2
        assert figures[f"{preset}: first picture s"] > 0 and len(figures[f"{preset}: kernels of step"]) > 5
        assert figures[f"{preset}: error against stock"]["pt"] < 0.1
    report = second.stdout[second.stdout.index("Ratios to stock") :]
    assert report.index("headline: exact: picture") < report.index("headline: exact: first picture s")
    assert report.index("First calls") < report.index("machine")

    third = run(tmp_path)
    assert third.returncode == 0 and lines(tmp_path) == after, "nothing is left to do"


def test_a_part_that_takes_too_long_is_cut_off_and_the_next_one_runs(tmp_path):
    result = run(tmp_path, "--part-budget", "0.2")
    assert result.returncode == 1
    assert [f"{part}: cut off: after 0 s" in result.stdout for part in PARTS] == [True] * 3


def test_budget_is_kept(tmp_path):
    result = run(tmp_path, "--budget", "1")
    assert result.returncode == 1 and result.stdout.count("not begun: the budget of 1 s is spent") == len(PARTS)


def test_time_of_a_step_is_looked_up_and_not_copied():
    """A device may be named "cuda", and tensors say "cuda:0"; likewise "cpu:0" and "cpu"."""
    pipe = load_fast("exact")
    settings = Settings(model=EMBEDDED_CHECKPOINT, size=(64, 64), dtype=torch.float32, device="cpu:0")
    step = workload("step", pipe, settings)
    projections = []
    hook = pipe.unet.time_proj.register_forward_hook(lambda *_: projections.append(1))
    step()
    hook.remove()
    assert not projections
