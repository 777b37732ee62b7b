"""Quantization of the UNet's linear layers: which scheme on which device, and which layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerRow,
    quantize_,
)

# Layers below this many weights cost more to quantize at run time than their smaller product saves.
_MIN_WEIGHTS = 512 * 512


@dataclass(frozen=True)
class QuantizationChoice:
    """A scheme to apply, or None, and why."""

    scheme: str | None
    reason: str


def choose_quantization(requested: str, device: torch.device, dtype: torch.dtype) -> QuantizationChoice:
    """Settle `FastConfig.quantization` for a device.

    Args:
        requested: a scheme, `"auto"` or `"none"`.
        device: where the UNet is.
        dtype: dtype of its weights.

    Raises:
        ValueError: a scheme, asked for by name, that the device or dtype cannot run.
    """
    if requested == "none":
        return QuantizationChoice(None, "switched off by FastConfig.quantization")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if requested == "auto":
        if capability is None:
            return QuantizationChoice(None, f"no scheme was measured to be faster than bfloat16 on {device.type}")
        if dtype != torch.bfloat16:
            return QuantizationChoice(None, f"weights are {dtype}; quantization needs bfloat16")
        if capability >= (8, 9):
            return QuantizationChoice("fp8-dynamic", f"float8 matrix units (capability {_dotted(capability)})")
        if capability >= (8, 0):
            return QuantizationChoice("int8-dynamic", f"int8 matrix units (capability {_dotted(capability)})")
        return QuantizationChoice(None, f"capability {_dotted(capability)} has no int8 or float8 matrix units")

    if requested.startswith("fp8") and (capability is None or capability < (8, 9)):
        raise ValueError(
            f"quantization={requested!r} needs a CUDA device of capability 8.9 or higher; this is "
            f"{device.type if capability is None else _dotted(capability)}. Use 'int8-weight-only', 'auto' or 'none'."
        )
    if requested == "int8-dynamic" and capability is not None and capability < (8, 0):
        raise ValueError(
            f"quantization='int8-dynamic' needs capability 8.0 or higher, this device has {_dotted(capability)}. "
            "Use 'int8-weight-only', 'auto' or 'none'."
        )
    if dtype == torch.float16:
        raise ValueError(
            f"quantization={requested!r} needs bfloat16 or float32 weights; load with torch_dtype=torch.bfloat16."
        )
    return QuantizationChoice(requested, "asked for by FastConfig.quantization")


def apply_quantization(unet: nn.Module, scheme: str) -> tuple[int, int]:
    """Quantize the eligible linear layers of a UNet in place, one layer at a time.

    Returns:
        The number of layers quantized and the number of linear layers left.
    """
    taken = {name for name, module in unet.named_modules() if is_quantizable(name, module)}
    left = sum(isinstance(m, nn.Linear) for m in unet.modules()) - len(taken)
    quantize_(unet, _torchao_config(scheme), filter_fn=lambda _, name: name in taken)
    return len(taken), left


def is_quantizable(name: str, module: nn.Module) -> bool:
    """Whether a layer is quantized: a large linear inside a transformer block that runs in every step.

    Time and added-condition embeddings steer every layer and cost next to nothing; cross-attention's `to_k` and
    `to_v` run once a prompt.
    """
    if type(module) is not nn.Linear or ".transformer_blocks." not in f".{name}":
        return False
    if name.endswith(("attn2.to_k", "attn2.to_v")):
        return False
    return module.weight.numel() >= _MIN_WEIGHTS


def _torchao_config(scheme: str):
    # set_inductor_config=False: otherwise torchao writes inductor's global configuration.
    if scheme == "fp8-dynamic":
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    if scheme == "fp8-weight-only":
        return Float8WeightOnlyConfig(set_inductor_config=False)
    if scheme == "int8-dynamic":
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    return Int8WeightOnlyConfig(set_inductor_config=False)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
