"""Both text encoders, positive and negative prompt, stock beside fast."""

from __future__ import annotations

import pytest
import torch
from interleave import run_pair

from fastdiff.bench.workloads import PROMPT


@pytest.mark.parametrize("timed", ["stock", "fast"])
def test_text_encoding(benchmark, pipes, batch, device, dtype, timed, rounds):
    benchmark.group = f"text encoding, {batch} prompt(s) with negative ones, {dtype}, eager"

    def make(name: str):
        def encode() -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return pipes[name].encode_prompt([PROMPT] * batch, negative_prompt=[""] * batch)

        return encode

    run_pair(benchmark, make, timed, rounds, device)
