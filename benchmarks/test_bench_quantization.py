"""One classifier-free-guidance step with each quantization scheme, stock in the same dtype beside it.

At full size, on an otherwise idle machine:

    pytest benchmarks/test_bench_quantization.py --model sdxl-random --size 256 --size 512 --rounds 3 \\
        --benchmark-json=results.json

What it costs in quality: `python -m fastdiff.bench.quantization --help`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interleave import run_interleaved

from fastdiff import FastConfig, FastStableDiffusionXLPipeline
from fastdiff.bench.settings import Settings
from fastdiff.bench.stock import load_stock, twin
from fastdiff.bench.workloads import as_array, workload

SCHEMES = ("none", "int8-dynamic", "int8-weight-only", "fp8-dynamic", "fp8-weight-only")


@pytest.fixture(scope="module")
def base(model, device, dtype):
    """The stock pipeline; of the full-size model the UNet alone."""
    return load_stock(
        Settings(model=model, size=(64, 64), dtype=getattr(torch, dtype), device=device, measures=("step",))
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unet_step(benchmark, base, settings, size, batch, device, dtype, scheme, rounds):
    # Weights are packed for CPUs as they are where no stock pipeline over them is alive.
    config = FastConfig.preset("balanced", quantization=scheme, pack_weights=True)
    fast = FastStableDiffusionXLPipeline.from_pipe(twin(base, channels_last=True), fast=config)
    try:
        assert fast.plan
    except ValueError as error:
        pytest.skip(str(error))
    done = getattr(fast.unet, "quantized", None)
    if scheme != "none" and done is None:
        pytest.skip("every layer of this model is too small to gain")
    if done is not None:
        assert done.bytes_after <= 0.55 * done.bytes_before
        benchmark.extra_info.update(
            layers=done.taken, layer_bytes=[done.bytes_before, done.bytes_after],
            unet_bytes=[done.model_before, done.model_after],
        )
    benchmark.group = f"quantized UNet step {size}x{size}, batch {2 * batch}, {dtype}"
    benchmark.extra_info["peer"] = "stock"
    steps = {name: workload("step", pipe, settings) for name, pipe in (("stock", base), ("fast", fast))}
    expected, got = as_array(steps["stock"]()), as_array(steps["fast"]())
    benchmark.extra_info["relative_error"] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    run_interleaved(benchmark, steps["fast"], steps["stock"], rounds, device)
