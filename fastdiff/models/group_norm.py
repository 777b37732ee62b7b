"""GroupNorm, with the SiLU that follows it, for pictures in channels_last, which it leaves so.

PyTorch's own copies them to NCHW and back, and the compiler's reads its statistics at the stride of the channels; the
next convolution pays for a transposition. On CUDA the operator is Triton kernels, elsewhere PyTorch's own functions.
Removable once PyTorch normalizes NHWC on CUDA where it is.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

# Of results around 1, of which bfloat16 keeps 8 bits; another result differs by more.
_LARGEST_DIFFERENCE = 0.1


@functools.cache
def define_operator() -> torch._ops.OpOverload:
    """Register, once, and return the operator

        fastdiff::channels_last_group_norm(x, groups, weight, bias, eps, silu) -> Tensor

    `x`: (samples, channels, ...), channels beside one another in memory. The result has the strides of `x`. It has no
    gradients.
    """
    schema = "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, bool silu) -> Tensor"
    name = "fastdiff::channels_last_group_norm"
    torch.library.define(name, schema, tags=(torch.Tag.needs_exact_strides,))
    torch.library.impl(name, "CompositeExplicitAutograd")(_plain)
    torch.library.impl(name, "CUDA")(_on_cuda)
    torch.library.register_fake(name)(lambda x, *_: torch.empty_like(x))
    return torch.ops.fastdiff.channels_last_group_norm.default


def has_kernels() -> bool:
    """Whether Triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def why_no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Whose GroupNorm serves a device, and why, or None for our kernels; they are tried, and compared, once."""
    if device.type != "cuda":
        return f"PyTorch's, which keeps the format on {device.type}"
    if not has_kernels():
        return "PyTorch's, as Triton is not installed"
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 60, 17, 9, generator=generator).mul_(3).add_(5)
        scale, shift = torch.randn(2, 60, generator=generator)
        x = x.to(device, dtype).to(memory_format=torch.channels_last)
        call = x, 6, scale.to(device, dtype), shift.to(device, dtype), 1e-5, True
        difference = (_on_cuda(*call) - _plain(*call)).abs().max().item()
    except Exception as error:
        return f"PyTorch's, as our kernels failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    return None if difference < _LARGEST_DIFFERENCE else f"PyTorch's, as our kernels differ by {difference:.3g}"


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether the channels of (samples, channels, ...) lie beside one another, and nothing between."""
    return x.ndim > 2 and x.movedim(1, -1).is_contiguous()


class ChannelsLastGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that leaves pictures in channels_last. Made by setting a module's class.

    Compiled regions have a pass of their own for it, which also takes in the SiLU that follows.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As upstream. `input`: (samples, channels, ...)."""
        if torch.compiler.is_compiling() or not input.is_cuda or not _can_compute(input):
            return super().forward(input)
        return define_operator()(input, self.num_groups, self.weight, self.bias, self.eps, False)


def _can_compute(x: torch.Tensor) -> bool:
    # No gradients, and no rule for autocast.
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)) and is_channels_last(x)


def _on_cuda(x, groups, weight, bias, eps, silu):
    from .group_norm_kernels import normalize

    if not is_channels_last(x):
        return _plain(x, groups, weight, bias, eps, silu)
    with torch.cuda.device(x.device):
        return normalize(x, groups, weight, bias, eps, silu)


def _plain(x, groups, weight, bias, eps, silu):
    normal = F.group_norm(x, groups, weight, bias, eps)
    out = torch.empty_like(x)
    return torch.ops.aten.silu.out(normal, out=out) if silu else out.copy_(normal)
