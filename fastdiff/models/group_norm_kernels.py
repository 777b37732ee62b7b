"""Triton kernels of `group_norm`; imported where Triton is installed.

A picture in NHWC is a matrix of pixels by channels. Statistics are taken a channel over its pixels, so that reads are
of neighbours, and only then a group over its channels: two passes over the picture, whatever the size of a group.
Sizes are arguments rather than constants: one binary serves every level of UNet and VAE, at any resolution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Pixels and channels of a tile: 128 bytes of a row in 16 bits, whole cache lines.
_ROWS, _CHANNELS = 32, 64
# Enough for several on each of a GPU's processors; more would leave more partial sums to combine.
_PROGRAMS = 1024
_PARTIAL_SUMS = 1024


@triton.jit
def _channel_statistics(x, partial, rows, channels, rows_each, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and sum of squared deviations of each channel, over `rows_each` pixels."""
    block, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    start = block * rows_each
    count = tl.minimum(rows_each, rows - start)
    x += (sample * rows + start) * channels
    # Deviations from a value of the channel's own: squares of a large mean would swallow a small variance.
    first = tl.load(x + channel, mask=is_channel, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for done in range(0, count, ROWS):
        row = done + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & is_channel[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        deviation = tl.where(inside, value.to(tl.float32) - first[None, :], 0.0)
        total += deviation
        squares += deviation * deviation
    sums = tl.sum(total, axis=0)
    mean = sums / count
    partial += (sample * tl.num_programs(0) + block) * 2 * channels
    tl.store(partial + channel, first + mean, mask=is_channel)
    tl.store(partial + channels + channel, tl.sum(squares, axis=0) - sums * mean, mask=is_channel)


@triton.jit
def _group_statistics(
    partial, weight, bias, affine, rows, channels, size, blocks, rows_each, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Factor and summand of each channel, from the statistics of its group of `size` channels."""
    sample, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member = tl.arange(0, SIZE)
    channel = group * size + member
    partial += sample * blocks * 2 * channels
    total = tl.zeros((BLOCKS, SIZE), tl.float32)
    for done in range(0, blocks, BLOCKS):
        block = done + tl.arange(0, BLOCKS)
        inside = (block < blocks)[:, None] & (member < size)[None, :]
        count = tl.minimum(rows_each, rows - block * rows_each).to(tl.float32)
        mean = tl.load(partial + block[:, None] * 2 * channels + channel[None, :], mask=inside, other=0.0)
        total += tl.where(inside, mean * count[:, None], 0.0)
    numbers = rows.to(tl.float32) * size
    group_mean = tl.sum(tl.sum(total, axis=1), axis=0) / numbers
    squares = tl.zeros((BLOCKS, SIZE), tl.float32)
    for done in range(0, blocks, BLOCKS):
        block = done + tl.arange(0, BLOCKS)
        inside = (block < blocks)[:, None] & (member < size)[None, :]
        count = tl.minimum(rows_each, rows - block * rows_each).to(tl.float32)
        place = partial + block[:, None] * 2 * channels + channel[None, :]
        mean = tl.load(place, mask=inside, other=0.0)
        within = tl.load(place + channels, mask=inside, other=0.0)
        away = mean - group_mean
        squares += tl.where(inside, within + away * away * count[:, None], 0.0)
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / numbers
    factor = tl.zeros((SIZE,), tl.float32) + 1 / tl.sqrt(variance + eps)
    if HAS_WEIGHT:
        factor *= tl.load(weight + channel, mask=member < size, other=0.0).to(tl.float32)
    summand = -group_mean * factor
    if HAS_BIAS:
        summand += tl.load(bias + channel, mask=member < size, other=0.0).to(tl.float32)
    affine += sample * 2 * channels
    tl.store(affine + channel, factor, mask=member < size)
    tl.store(affine + channels + channel, summand, mask=member < size)


@triton.jit
def _normalize(x, affine, out, rows, channels, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """x * factor + summand, then SiLU."""
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    affine += sample * 2 * channels
    factor = tl.load(affine + channel, mask=is_channel, other=0.0)
    summand = tl.load(affine + channels + channel, mask=is_channel, other=0.0)
    place = (sample * rows + row)[:, None] * channels + channel[None, :]
    inside = (row < rows)[:, None] & is_channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * factor[None, :] + summand[None, :]
    if SILU:
        value = value / (1 + tl.exp(-value))
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def normalize(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, silu: bool
) -> torch.Tensor:
    """GroupNorm, and SiLU of it, of a tensor (samples, channels, ...) whose channels lie beside one another."""
    samples, channels = x.shape[:2]
    rows, size = x.numel() // (samples * channels), channels // groups
    stripes = triton.cdiv(channels, _CHANNELS)
    wanted = max(1, min(_PROGRAMS // (samples * stripes), triton.cdiv(rows, 2 * _ROWS)))
    rows_each = triton.cdiv(triton.cdiv(rows, wanted), _ROWS) * _ROWS
    blocks = triton.cdiv(rows, rows_each)
    partial = torch.empty(samples, blocks, 2, channels, device=x.device, dtype=torch.float32)
    affine = torch.empty(samples, 2, channels, device=x.device, dtype=torch.float32)
    out = torch.empty_like(x)
    _channel_statistics[blocks, stripes, samples](
        x, partial, rows, channels, rows_each, ROWS=_ROWS, CHANNELS=_CHANNELS
    )
    width = triton.next_power_of_2(size)
    _group_statistics[samples, groups](
        partial, weight, bias, affine, rows, channels, size, blocks, rows_each, eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        BLOCKS=max(1, min(triton.next_power_of_2(blocks), _PARTIAL_SUMS // width)), SIZE=width,
    )  # fmt: skip
    _normalize[triton.cdiv(rows, _ROWS), stripes, samples](
        x, affine, out, rows, channels, SILU=silu, ROWS=_ROWS, CHANNELS=_CHANNELS
    )
    return out
