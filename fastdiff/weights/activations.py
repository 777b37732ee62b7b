"""Activations to uint8, as they come: one scale and one zero point an input. Weights to int8, by compiled code."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..native import load_library

# One less than fits in 8 bits, as the zero point is rounded too: so that the lowest number comes to -0.49 levels or
# more, and the highest to 254.51 or less. Nothing has to be clamped.
_LEVELS, _ROUNDING = 254, 0.51
_TINY = 1e-30
# Numbers that are quantized at a time without compiled code: the pass after finds them in the cache, and no fresh
# memory, whose pages cost most on a CPU, is touched. Below a few such blocks the calls cost more than that.
_BLOCK, _FEW_BLOCKS = 1 << 19, 4
# Between int8 and uint8. Without compiled code numbers become int8 first, which PyTorch does seven times as fast.
_SIGN = 128
_SOURCE = Path(__file__).with_name("activations.cpp")
_COMPILED = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


class Quantized(NamedTuple):
    """`(values - zero_point) * scale` is the input, rounded. What is not finite in it makes `scale` not finite."""

    values: torch.Tensor
    scale: float
    zero_point: int


def quantize(x: torch.Tensor) -> Quantized:
    """Quantize a tensor of any shape."""
    x = x.contiguous()
    function = _compiled(x.dtype)
    if function is not None:
        return _call(function, x, torch.empty(x.shape, dtype=torch.uint8), (1, 1, 1, x.numel()), (0, 0))
    scale, zero_point, inverse, offset = _range(x)
    if x.numel() <= _FEW_BLOCKS * _BLOCK:
        levels = torch.add(offset, x, alpha=inverse).round_().to(torch.int8)
        return Quantized(levels.view(torch.uint8).bitwise_xor_(_SIGN), scale, zero_point)
    values, block = torch.empty(x.numel(), dtype=torch.uint8), torch.empty(_BLOCK, dtype=x.dtype)
    for part, levels in zip(x.view(-1).split(_BLOCK), values.split(_BLOCK), strict=True):
        levels.view(torch.int8).copy_(torch.add(offset, part, alpha=inverse, out=block[: len(part)]).round_())
        levels.bitwise_xor_(_SIGN)
    return Quantized(values.view(x.shape), scale, zero_point)


def quantize_padded(x: torch.Tensor, padding: tuple[int, int]) -> Quantized:
    """Quantize what a convolution takes, padded with zeros (which are `zero_point`), in channels_last.

    Args:
        x: (batch, channels, height, width).
        padding: rows above and below, columns at the left and the right.

    Returns:
        Values of (batch, channels, height + 2 * rows, width + 2 * columns).
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    function = _compiled(x.dtype)
    if function is not None:
        shape = (batch, channels, height + 2 * padding[0], width + 2 * padding[1])
        values = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        return _call(function, x, values, (batch, height, width, channels), padding)
    values, scale, zero_point = quantize(x.permute(0, 2, 3, 1))
    if any(padding):
        values = F.pad(values, (0, 0, padding[1], padding[1], padding[0], padding[0]), value=zero_point)
    return Quantized(values.permute(0, 3, 1, 2), scale, zero_point)


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """The pass as compiled code, or None where it cannot be had."""
    library = load_library(_SOURCE)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for dtype in _COMPILED.values() if library is not None else ():
        inputs, rows = (getattr(library, f"fastdiff_quantize_{name}{dtype}") for name in ("", "rows_"))
        inputs.argtypes = [pointer] * 2 + [number] * 6 + [pointer]
        rows.argtypes = [pointer] * 3 + [number] * 4
        inputs.restype = rows.restype = None
    return library


def quantize_rows(weight: torch.Tensor, in_16_bits: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Quantize a weight to -127 to 127, with a scale for each index of its first dimension.

    Args:
        weight: (out_features, in_features) or (out_channels, in_channels, height, width).
        in_16_bits: whether to keep numbers of neighbouring inputs so small that the sum of their products with uint8
            fits in 16 bits.

    Returns:
        int8 of the weight's shape, and float32 scales; None without compiled code for this dtype and memory format.
    """
    function = _compiled(weight.dtype, "rows_")
    is_channels_last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    dense = weight.is_contiguous() or is_channels_last
    if function is None or not dense or weight.device.type != "cpu" or not weight.numel():
        return None
    values = torch.empty_like(weight, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float32)
    channels = weight.shape[1] if in_16_bits else 0
    inner = 1 if is_channels_last else weight[0, 0].numel()
    pointers = (weight.data_ptr(), values.data_ptr(), scales.data_ptr())
    function(*pointers, len(weight), weight.numel() // len(weight), channels, inner)
    return values, scales


def _compiled(dtype: torch.dtype, name: str = ""):
    kernels = load_kernels() if dtype in _COMPILED else None
    return None if kernels is None else getattr(kernels, f"fastdiff_quantize_{name}{_COMPILED[dtype]}")


def _call(function, x: torch.Tensor, values: torch.Tensor, sizes: tuple, padding: tuple[int, int]) -> Quantized:
    found = (ctypes.c_float * 2)()
    function(x.data_ptr(), values.data_ptr(), *sizes, *padding, ctypes.addressof(found))
    return Quantized(values, found[0], int(found[1]))


def _range(x: torch.Tensor) -> tuple[float, int, float, torch.Tensor]:
    # `aminmax` keeps what is not finite.
    low, high = (bound.item() for bound in torch.aminmax(x)) if x.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        return math.nan, 0, math.nan, torch.tensor(0.0, dtype=x.dtype)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high / _LEVELS - low / _LEVELS, _TINY)
    zero_point = math.floor(_ROUNDING - low / scale)
    return scale, zero_point, 1 / scale, torch.tensor(float(zero_point - _SIGN), dtype=x.dtype)
