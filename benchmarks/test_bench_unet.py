"""One classifier-free-guidance step of the UNet, eager, stock beside fast.

At full size, on an otherwise idle machine:

    pytest benchmarks/test_bench_unet.py --model sdxl-random --size 256 --size 512 --benchmark-json=results.json
"""

from __future__ import annotations

import numpy as np
import pytest
from interleave import run_pair

from fastdiff.bench.ladder import weight_bytes
from fastdiff.bench.workloads import as_array, workload


@pytest.mark.parametrize("timed", ["stock", "fast"])
def test_unet_step(benchmark, pipes, settings, size, batch, device, dtype, timed, rounds):
    benchmark.group = f"UNet step {size}x{size}, batch {2 * batch}, {dtype}, eager"
    stock, fast = (as_array(workload("step", pipes[name], settings)()) for name in ("stock", "fast"))
    benchmark.extra_info["relative_error"] = float(np.linalg.norm(fast - stock) / np.linalg.norm(stock))
    run_pair(benchmark, lambda name: workload("step", pipes[name], settings), timed, rounds, device)


def test_weights_are_held_once(pipes):
    assert weight_bytes(pipes["fast"]) <= 1.01 * weight_bytes(pipes["stock"])
