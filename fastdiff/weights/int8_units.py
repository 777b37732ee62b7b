"""What this CPU computes int8 products with, and how far it can sum them."""

from __future__ import annotations

import functools

import torch

# In the order of how fast they are, by torch's names for what a CPU has.
_UNITS = {"amx_int8": "AMX", "avx512_vnni": "VNNI", "avx_vnni": "VNNI", "avx2": "AVX2"}
_FEATURES, _ROWS, _SIDE = 64, 8, 10


def int8_units() -> str | None:
    """The CPU's units for int8 products: "AMX", "VNNI", "AVX2", or None, also without oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return None
    capabilities = torch.cpu.get_capabilities()
    return next((unit for name, unit in _UNITS.items() if capabilities.get(name)), None)


def check_int8_units() -> None:
    """Refuse `int8-dynamic` on a CPU that cannot compute it.

    Raises:
        ValueError: the CPU has not even AVX2, or PyTorch no oneDNN.
    """
    if int8_units() is None:
        raise ValueError(
            "quantization='int8-dynamic' needs an x86 CPU with AVX2, VNNI or AMX, and oneDNN; here one of them is "
            "missing. Use 'int8-weight-only', 'auto' or 'none'."
        )


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which oneDNN's int8 kernels are to give what goes on in `dtype`.

    In bfloat16 all but those of CPUs with AVX512 or newer units are reference kernels, a hundred times as slow.
    """
    has_others = torch.ops.mkldnn._is_mkldnn_bf16_supported() and not sums_in_16_bits()
    return dtype if has_others else torch.float32


@functools.cache
def sums_in_16_bits() -> bool:
    """Whether the sum of two neighbouring products is cut off at 16 bits, as by CPUs without VNNI.

    Found out by computing the largest ones, as oneDNN may be told to do without units that the CPU has
    (`ONEDNN_MAX_CPU_ISA`).
    """
    no_zero_points, ones = torch.zeros(0, dtype=torch.int32), torch.ones(_FEATURES)
    weight = torch.full((_FEATURES, _FEATURES), 127, dtype=torch.int8)
    rows = torch.full((_ROWS, _FEATURES), 255, dtype=torch.uint8)
    product = torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 0, torch.ops.onednn.qlinear_prepack(weight, None), ones, no_zero_points, None, 1.0, 0,
        torch.float32, "none", [], "none",
    )
    picture = torch.full((1, _FEATURES, _SIDE, _SIDE), 255, dtype=torch.uint8).to(memory_format=torch.channels_last)
    steps = ((1, 1), (0, 0), (1, 1), 1)
    kernel = weight[:, :, None, None].contiguous()
    packed = torch.ops.onednn.qconv_prepack(kernel, ones, 1.0, 0, *steps, list(picture.shape))
    convolved = torch.ops.onednn.qconv_pointwise(
        picture, 1.0, 0, packed, ones, no_zero_points, None, *steps, 1.0, 0, torch.float32, "none", [], "none"
    )
    exact = 255.0 * 127.0 * _FEATURES
    return bool((product < exact).any() or (convolved < exact).any())
