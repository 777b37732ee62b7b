"""A real IP-Adapter for the embedded checkpoint."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

IMAGE_DIM, TOKENS = 32, 4


def make_ip_adapter(unet: UNet2DConditionModel, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights in the layout that `load_ip_adapter` takes."""
    generator = torch.Generator().manual_seed(seed)
    width = unet.config.cross_attention_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    adapter = {}
    for index, name in enumerate(layers):
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            adapter[f"{2 * index + 1}.{part}.weight"] = normal(inner, width)
    projection = {
        "proj.weight": normal(TOKENS * width, IMAGE_DIM),
        "proj.bias": torch.zeros(TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": adapter}


def image_embeds(seed: int = 0) -> list[torch.Tensor]:
    """What a caller passes as `ip_adapter_image_embeds` with guidance: negative and positive, (2, 1, dim)."""
    return [torch.randn(2, 1, IMAGE_DIM, generator=torch.Generator().manual_seed(seed))]
