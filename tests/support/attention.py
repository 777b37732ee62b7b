"""Queries, keys and values for tests of attention kernels, and what all of those hold to."""

from __future__ import annotations

from collections.abc import Callable

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


def check_rows_are_apart(attend: Callable) -> None:
    """What is not finite in a query stays in its row."""
    query, key, value = qkv(1, 2, 30, 64)
    expected = attend(query, key, value, None)
    query[0, 1, 7] = torch.nan
    result = attend(query, key, value, None)
    assert result[0, 1, 7].isnan().all()
    result[0, 1, 7] = expected[0, 1, 7]
    assert torch.equal(result, expected)


def check_what_is_left_to_pytorch(attend: Callable) -> None:
    """Other dtypes, devices, shapes and masks, and what wants gradients."""
    query, key, value = qkv(1, 2, 30, 64)
    assert attend(query, key, value, None) is not None
    assert attend(query.float(), key.float(), value.float(), None) is None
    assert attend(query, key, value[:, :, :3], None) is None
    assert attend(query, key, value, torch.zeros(1, 2, 1, 64).bfloat16()) is None
    assert attend(query, key, value, torch.zeros(1, 1, 1, 64)) is None
    assert attend(query[:, :, :0], key, value, None) is None
    assert attend(query.to("meta"), key.to("meta"), value.to("meta"), None) is None
    assert attend(query.clone().requires_grad_(), key, value, None) is None
    with torch.no_grad():
        assert attend(query.clone().requires_grad_(), key, value, None) is not None
