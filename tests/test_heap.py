"""Memory of the weights that a plan laid out anew goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PLAN = """
import sys
from pathlib import Path

sys.path.insert(0, "tests")
import torch
from diffusers import UNet2DConditionModel
from support.embedded import load_stock
from fastdiff import FastConfig, FastStableDiffusionXLPipeline

def resident():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

stock = load_stock()
widths = {"block_out_channels": (64, 320, 640), "attention_head_dim": (1, 5, 10)}
stock.unet = UNet2DConditionModel.from_config({**stock.unet.config, "_name_or_path": "", **widths})
fast = FastConfig(pack_weights=True, quantization="none", tuning="off")
pipe = FastStableDiffusionXLPipeline(**stock.components, fast=fast)
del stock
weights, before = sum(p.nbytes for p in pipe.unet.parameters()), resident()
steps = {step.name: step.applied for step in pipe.plan}
assert steps["fuse_qkv"] and steps["pack_weights"], steps
print(weights, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's figure of resident memory")
def test_memory_of_weights_that_were_laid_out_anew_is_returned():
    command = [sys.executable, "-c", PLAN]
    ran = subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
    weights, grown = map(int, ran.stdout.split())
    assert weights > 100 * 2**20 and grown < 0.05 * weights, (weights, grown)
