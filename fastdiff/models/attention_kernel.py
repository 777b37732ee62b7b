"""Attention on CPUs in bfloat16: by a kernel of ours for heads of 64 channels, as SDXL's UNet has, or by products."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ..native import load_library
from .processor import FusedQKVAttnProcessor

_SOURCE = Path(__file__).with_name("attention.cpp")
HEAD_DIM, DTYPE = 64, torch.bfloat16
# That are computed at a time, so that they are in the cache for what follows.
_SCORES = 1 << 20


@functools.cache
def load_attention() -> Callable | None:
    """The compiled kernel; None without a compiler, or on a processor that does not multiply bfloat16 in vectors."""
    function = getattr(load_library(_SOURCE), "fastdiff_attention", None)
    if function is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        function.argtypes = [pointer] * 5 + [number] * 4 + [pointer, ctypes.c_float]
        function.restype = ctypes.c_int32
    return function


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """`F.scaled_dot_product_attention` without dropout, where the kernel can compute it.

    Args:
        query, key, value: (batch, heads, tokens, 64), of any strides but the last.
        mask: None, or (1, 1, 1, tokens of the keys), added to the scores.

    Returns:
        (batch, heads, tokens, 64), a view of (batch, tokens, heads, 64); None for what the kernel does not take:
        gradients, compiled code, other dtypes, devices and masks.
    """
    function = load_attention() if query.shape[-1] == HEAD_DIM and _can_take(query, key, value, mask) else None
    if function is None:
        return None
    batch, heads, queries, channels = query.shape
    out = query.new_empty(batch, queries, heads, channels).transpose(1, 2)
    strides = (ctypes.c_int64 * 12)(*(n for x in (query, key, value, out) for n in x.stride()[:3]))
    pointers = (query.data_ptr(), key.data_ptr(), value.data_ptr(), None if mask is None else mask.data_ptr())
    sizes = (batch, heads, queries, key.shape[2])
    failed = function(*pointers, out.data_ptr(), *sizes, ctypes.addressof(strides), HEAD_DIM**-0.5)
    return None if failed else out


def attend_in_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Attention as a product, a softmax and a product of PyTorch's, whose scores are rounded to bfloat16.

    Lossy: `F.scaled_dot_product_attention` keeps scores in float32. Rounding them costs a third to a half of what an
    error of 1 % in queries and keys does, however large they are.

    Args:
        query, key, value: (batch, heads, tokens, channels).
        mask: None, or (1, 1, 1, tokens of the keys), added to the scores.

    Returns:
        (batch, heads, tokens, channels); None for what `attend` does not take either, other head sizes apart.
    """
    if not _can_take(query, key, value, mask):
        return None
    shape, channels = query.shape, query.shape[-1]
    added = query.new_zeros(1, 1, 1) if mask is None else mask[0]
    # What is not contiguous would be copied for each part.
    query, key, value = (tensor.contiguous().flatten(0, 1) for tensor in (query, key, value))
    keys, out = key.transpose(1, 2), torch.empty_like(query)
    heads = max(1, _SCORES // (query.shape[1] * key.shape[1]))
    rows = max(1, _SCORES // key.shape[1])
    for q, k, v, attended in zip(*(x.split(heads) for x in (query, keys, value, out)), strict=True):
        for some, result in zip(q.split(rows, dim=1), attended.split(rows, dim=1), strict=True):
            scores = torch.baddbmm(added, some, k, alpha=channels**-0.5)
            torch.bmm(scores.softmax(dim=-1), v, out=result)
    return out.view(shape)


def apply_attention(model: nn.Module, kernels: Mapping[str, Callable]) -> int:
    """Have the layers of a kind, `"self"` or `"cross"`, attend by the kernel given for it, and all others by PyTorch's.

    Returns:
        How many layers of these kinds there are.
    """
    count = 0
    for layer in attending(model).values():
        if layer.processor.kernels != kernels:  # compiled code depends on it
            layer.processor.kernels = kernels
        count += kind_of(layer) in kernels
    return count


def attending(model: nn.Module) -> dict[str, Any]:
    """The layers that have fastdiff's processor, by name."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Attention)}
    return {name: layer for name, layer in layers.items() if isinstance(layer.processor, FusedQKVAttnProcessor)}


def kind_of(layer: Any) -> str:
    """`"self"` or `"cross"`."""
    return "cross" if layer.is_cross_attention else "self"


def _can_take(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if torch.compiler.is_compiling() or not all(map(_fits, tensors)):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    batch, heads, _, channels = query.shape
    keys = key.shape[2]
    shape = (batch, heads, keys, channels)
    if key.shape != shape or value.shape != shape or not query.numel() or not keys:
        return False
    return mask is None or mask.shape == (1, 1, 1, keys)


def _fits(tensor: torch.Tensor) -> bool:
    plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.dtype == DTYPE
    return plain and tensor.stride(-1) == 1
