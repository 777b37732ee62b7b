"""The VAE compiles in regions that cover nearly all of it, and serve new sizes and batches."""

from collections import Counter

import diffusers
import pytest
import torch
from legs import LEG, only_patched
from torch import nn

SHAPES = [(batch, 4, size, size) for size in (8, 12, 16, 10) for batch in (1, 2)]


@pytest.fixture(scope="module")
def vae():
    torch._dynamo.reset()
    return LEG.pipeline().vae


def count_flops(model: nn.Module, call) -> Counter:
    """Multiply-adds of each convolution in a call."""
    flops = Counter()

    def add(conv, args, output):
        flops[conv] += output.numel() * conv.weight[0].numel()

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d)]
    call()
    for handle in handles:
        handle.remove()
    return flops


@torch.no_grad()
def test_regions_cover_the_vae_and_serve_new_shapes(vae):
    latents = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in SHAPES]
    flops = count_flops(vae, lambda: vae.decode(latents[0], return_dict=False))
    expected = [vae.decode(sample, return_dict=False)[0] for sample in latents]
    graphs = []

    regions = LEG.compile_regions(vae, lambda graph, _: graphs.append(graph) or graph)
    compiled = {module for region in regions for module in region.modules()}
    assert sum(flops[module] for module in compiled) > 0.9 * flops.total()

    for sample, reference in zip(latents, expected, strict=True):
        torch.testing.assert_close(vae.decode(sample, return_dict=False)[0], reference, rtol=0, atol=1e-4)
    assert graphs


@only_patched
@pytest.mark.parametrize(
    "name", ["AutoencoderKLFlux2", "AsymmetricAutoencoderKL", "AutoencoderKLTemporalDecoder", "VQModel"]
)
@torch.no_grad()
def test_its_siblings_compile_in_regions(name):
    torch._dynamo.reset()
    model = getattr(diffusers, name)(norm_num_groups=32) if name == "VQModel" else getattr(diffusers, name)()
    graphs = []
    regions = LEG.compile_regions(model.eval(), lambda graph, _: graphs.append(graph) or graph)
    assert len(regions) == 2
    model.encode(torch.zeros(1, 3, 16, 16))
    assert len(graphs) == 1
