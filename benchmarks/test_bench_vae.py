"""One decode of the VAE, eager, stock beside fast."""

from __future__ import annotations

import pytest
from interleave import run_pair

from fastdiff.bench.workloads import workload


@pytest.mark.parametrize("timed", ["stock", "fast"])
def test_vae_decode(benchmark, pipes, settings, size, batch, device, dtype, timed, rounds):
    benchmark.group = f"VAE decode {size}x{size}, batch {batch}, {dtype}, eager"
    run_pair(benchmark, lambda name: workload("vae", pipes[name], settings), timed, rounds, device)
