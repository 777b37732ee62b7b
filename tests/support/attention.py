"""Queries, keys and values for tests of attention kernels."""

from __future__ import annotations

import torch

# Batch, heads, queries, keys.
SIZES = {
    "self": (2, 3, 64, 64),
    "one query": (1, 1, 1, 80),
    "odd": (1, 5, 37, 77),
    "one key": (2, 1, 25, 1),
    "many keys": (1, 2, 30, 1100),
}


def qkv(batch: int, heads: int, queries: int, keys: int, channels: int = 64) -> list[torch.Tensor]:
    """Queries, keys and values as a fused projection leaves them: neither side by side nor aligned."""
    generator = torch.Generator().manual_seed(0)
    joined = [torch.randn(batch, n, 3 * heads * channels + 2, generator=generator) for n in (queries, keys, keys)]
    parts = [x.bfloat16()[..., 1:-1].chunk(3, dim=-1)[i] for i, x in enumerate(joined)]
    return [part.unflatten(-1, (heads, channels)).transpose(1, 2) for part in parts]


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.float() - expected).norm() / expected.norm()).item()


def hide(keys: int, count: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, 1, keys, dtype=torch.bfloat16)
    mask[..., keys - count :] = -torch.inf
    return mask
