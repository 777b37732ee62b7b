"""Attention on CPUs by a kernel of ours: bfloat16, heads of 64 channels, as SDXL's UNet has them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from ..native import load_library
from .processor import FusedQKVAttnProcessor

_SOURCE = Path(__file__).with_name("attention.cpp")
HEAD_DIM, DTYPE = 64, torch.bfloat16


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
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if torch.compiler.is_compiling() or not all(map(_fits, tensors)):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    batch, heads, queries, channels = query.shape
    keys = key.shape[2]
    shape = (batch, heads, keys, channels)
    if channels != HEAD_DIM or key.shape != shape or value.shape != shape or not query.numel() or not keys:
        return None
    if mask is not None and mask.shape != (1, 1, 1, keys):
        return None
    function = load_attention()
    if function is None:
        return None
    out = query.new_empty(batch, queries, heads, channels).transpose(1, 2)
    strides = (ctypes.c_int64 * 12)(*(n for x in (query, key, value, out) for n in x.stride()[:3]))
    pointers = (query.data_ptr(), key.data_ptr(), value.data_ptr(), None if mask is None else mask.data_ptr())
    sizes = (batch, heads, queries, keys)
    failed = function(*pointers, out.data_ptr(), *sizes, ctypes.addressof(strides), HEAD_DIM**-0.5)
    return None if failed else out


def attend_copied(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` without dropout, over copies in which each head's tokens lie together.

    Projections leave heads side by side in each token, and PyTorch's kernel for CPUs reads the keys once for every few
    queries: from that many places, which can take longer than the copies.
    """
    query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


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


def _fits(tensor: torch.Tensor) -> bool:
    plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.dtype == DTYPE
    return plain and tensor.stride(-1) == 1
