"""One self- and one cross-attention layer of the UNet, the context cached in the fast one, stock beside fast."""

from __future__ import annotations

import pytest
import torch
from interleave import run_pair

KINDS = ("attn1", "attn2")


@pytest.mark.parametrize("timed", ["stock", "fast"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention(benchmark, pipes, kind, size, batch, device, dtype, timed, rounds):
    benchmark.group = f"{kind} of the middle block, {size}x{size}, batch {2 * batch}, {dtype}, eager"
    generator = torch.Generator().manual_seed(0)
    unet = pipes["stock"].unet
    levels = len(unet.config.block_out_channels) - 1
    tokens = (size // 8 >> levels) ** 2
    shape = (2 * batch, tokens, unet.config.block_out_channels[-1])
    hidden = torch.randn(shape, generator=generator).to(device, unet.dtype)
    context = torch.randn(2 * batch, 77, unet.config.cross_attention_dim, generator=generator).to(device, unet.dtype)

    def make(name: str):
        block = pipes[name].unet.mid_block.attentions[0].transformer_blocks[0]
        given = None if kind == "attn1" else context
        if given is not None and name == "fast":
            with torch.no_grad():
                given = pipes[name].unet.context_cache.project(context)[block.context_index]

        def attend() -> torch.Tensor:
            with torch.no_grad():
                return getattr(block, kind)(hidden, encoder_hidden_states=given)

        return attend

    run_pair(benchmark, make, timed, rounds, device)
