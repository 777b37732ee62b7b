"""From prompt to picture, eager, stock beside fast. What compiling adds is in the ladder: `fastdiff bench`."""

from __future__ import annotations

import pytest
from interleave import run_pair

from fastdiff.bench.workloads import workload


@pytest.mark.parametrize("timed", ["stock", "fast"])
def test_picture(benchmark, pipes, settings, size, batch, device, dtype, timed, rounds):
    benchmark.group = f"picture {size}x{size}, batch {batch}, {settings.steps} steps, {dtype}, eager"
    run_pair(benchmark, lambda name: workload("picture", pipes[name], settings), timed, rounds, device)
