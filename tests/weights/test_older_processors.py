"""What processors without newer units choose, and that it is right: oneDNN is told to do without them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.weights.int8_units import int8_units

# What each processor lacks of the next.
PROCESSORS = {
    "Haswell": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "Skylake": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "Cascade Lake": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "Cooper Lake": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
DRAW = """
import json, sys
from pathlib import Path
import torch
sys.path[:0] = sys.argv[2:]
from support.embedded import draw, load_stock
from test_quantization import make_wide_unet
from fastdiff import FastConfig, FastStableDiffusionXLPipeline, choices
from fastdiff.weights.int8 import Int8
from fastdiff.weights.packed import Packed

choices.MIN_PARAMETERS = 0
torch.manual_seed(0)
found = {}
for dtype in (torch.float32, torch.bfloat16):
    stock = load_stock(unet=make_wide_unet()).to(dtype)
    expected = draw(stock, num_inference_steps=1).float()
    for wanted in ("auto", "int8-dynamic", "none"):
        config = FastConfig.preset("balanced", quantization=wanted, pack_weights=True, tuning=sys.argv[1])
        pipe = FastStableDiffusionXLPipeline.from_pipe(stock, fast=config)
        pipe.set_progress_bar_config(disable=True)
        try:
            result = draw(pipe, num_inference_steps=1).float()
        except ValueError as error:
            found[f"{dtype} {wanted}"] = str(error)
            continue
        layers = list(pipe.unet.modules())
        found[f"{dtype} {wanted}"] = {
            "distance": ((result - expected).norm() / expected.norm()).item(),
            "int8": sum(isinstance(layer, Int8) for layer in layers),
            "packed": sum(isinstance(layer, Packed) for layer in layers),
            "reason": next(step.reason for step in pipe.plan if step.name == "quantize"),
        }
print(json.dumps(found))
"""


@pytest.mark.parametrize("processor", PROCESSORS)
def test_whatever_is_chosen_is_right(processor, tmp_path):
    if int8_units() in ([None] if processor == "Haswell" else [None, "AVX2"]):
        pytest.skip("the processor itself has no more")
    here = Path(__file__).parent
    arguments = [sys.executable, "-c", DRAW, str(tmp_path / "tuning.json"), str(here), str(here.parent)]
    environment = {**os.environ, **PROCESSORS[processor]}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, outcome in json.loads(done.stdout.splitlines()[-1]).items():
        if isinstance(outcome, str):  # asked for by name, and too slow or wrong here
            assert "int8-dynamic" in case and "was measured on this machine" in outcome, outcome
            continue
        rounding = 1e-4 if "float32" in case else 0.03
        limit = 0.1 if outcome["int8"] else rounding
        assert outcome["distance"] < limit, (case, outcome)
        assert outcome["int8"] == 0 or "none" not in case
