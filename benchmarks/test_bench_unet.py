"""One classifier-free-guidance step of the full-size SDXL UNet, eager, stock beside fast.

Run on an otherwise idle machine:

    pytest benchmarks/test_bench_unet.py --benchmark-json=results.json
"""

from __future__ import annotations

import pytest
import torch
from interleave import run_interleaved
from sdxl_random import random_unet

from fastdiff import FastUNet2DConditionModel

ROUNDS = {256: 12, 512: 6}


@pytest.fixture(scope="module")
def unets() -> dict[str, torch.nn.Module]:
    """The stock UNet, and the fast one over the same weights; convolutions are channels_last in the fast one only."""
    stock = random_unet()
    fast = FastUNet2DConditionModel.from_stock(stock)
    for module in fast.modules():
        if isinstance(module, torch.nn.Conv2d):
            weight = module.weight.detach().to(memory_format=torch.channels_last)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    fast.fuse_qkv_projections()
    return {"stock": stock, "fast": fast}


def step(unet: torch.nn.Module, size: int):
    """A callable that runs one step, batch 2, on inputs that stay the same: what the loop does between prompts."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    inputs = {
        "sample": normal(2, 4, size // 8, size // 8),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": normal(2, 77, 2048),
        "added_cond_kwargs": {"text_embeds": normal(2, 1280), "time_ids": torch.zeros(2, 6, dtype=torch.bfloat16)},
        "return_dict": False,
    }

    def run() -> torch.Tensor:
        with torch.no_grad():
            return unet(**inputs)[0]

    return run


@pytest.mark.parametrize("size", ROUNDS)
@pytest.mark.parametrize("timed", ["stock", "fast"])
def test_unet_step(benchmark, unets, size, timed):
    benchmark.group = f"UNet step {size}x{size}, batch 2, bfloat16, eager"
    peer = "fast" if timed == "stock" else "stock"
    stock, fast = (step(unets[name], size)() for name in ("stock", "fast"))
    benchmark.extra_info["relative_error"] = float((fast - stock).float().norm() / stock.float().norm())
    benchmark.extra_info["peer"] = peer
    run_interleaved(benchmark, step(unets[timed], size), step(unets[peer], size), ROUNDS[size])


def test_weights_are_held_once(unets):
    parameters = {
        name: {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in unet.parameters()}
        for name, unet in unets.items()
    }
    assert sum(parameters["fast"].values()) <= sum(parameters["stock"].values())
