"""Blocks of open channels: one graph for all of them, the same results, and gradients and autocast as in stock."""

from __future__ import annotations

import copy

import pytest
import torch
from support.embedded import load_fast
from torch._dynamo.utils import counters

from fastdiff.compiler.compilation import apply_compilation, repeated_blocks

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled_blocks(name: str):
    """The UNet's blocks of one class, compiled, and plain copies of them."""
    unet = load_fast().unet
    unet._repeated_blocks = [name]
    plain = copy.deepcopy(repeated_blocks(unet))
    apply_compilation(unet, "regional")
    return list(zip(repeated_blocks(unet), plain, strict=True))


def inputs(block, samples: int = 2, height: int = 10) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    channels = block.in_channels if hasattr(block, "in_channels") else block.channels
    sample = torch.randn(samples, channels, height, 6, generator=generator)
    if not hasattr(block, "time_emb_proj"):
        return (sample,)
    return sample, torch.randn(samples, block.time_emb_proj.in_features, generator=generator)


@torch.no_grad()
def test_generated_code_serves_all_channels():
    pairs = compiled_blocks("ResnetBlock2D")
    channels = {(block.in_channels, block.out_channels) for block, _ in pairs}
    shortcuts = {block.conv_shortcut is not None for block, _ in pairs}
    assert len(channels) > len(shortcuts) == 2
    for block, plain in pairs:
        for height in (10, 13):
            torch.testing.assert_close(block(*inputs(block, 2, height)), plain(*inputs(block, 2, height)))
    assert counters["stats"]["unique_graphs"] == 2


@torch.no_grad()
def test_samplers_of_all_channels_share_a_graph():
    pairs = compiled_blocks("Upsample2D")
    assert len({block.channels for block, _ in pairs}) == len(pairs) > 1
    for block, plain in pairs:
        torch.testing.assert_close(block(*inputs(block)), plain(*inputs(block)))
    assert counters["stats"]["unique_graphs"] == 1


def test_gradients_are_those_of_plain_blocks():
    block, plain = compiled_blocks("Downsample2D")[0]
    gradients = []
    for module in (block, plain):
        (sample,) = inputs(module)
        module(sample.requires_grad_()).square().sum().backward()
        gradients.append([sample.grad, module.conv.weight.grad, module.conv.bias.grad])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_autocast_casts_as_in_plain_blocks():
    block, plain = compiled_blocks("Downsample2D")[0]
    with torch.autocast("cpu", torch.bfloat16):
        result, wanted = block(*inputs(block)), plain(*inputs(plain))
    assert result.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(result, wanted)
