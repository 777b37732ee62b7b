"""Which scheme on which device, and which requests are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .int8_units import check_int8_units, int8_units
from .sources import free_memory

# Below this many parameters a model's layers are so small that quantizing their input outweighs what is saved.
_MIN_PARAMETERS = 100_000_000
# Of free memory, for what can as well be left undone.
_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True)
class QuantizationChoice:
    """A scheme to apply, or None, and why."""

    scheme: str | None
    reason: str


def choose_quantization(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    parameters: int,
    is_compiled: bool = False,
    is_shared: bool = False,
    needed: Callable[[], int] = lambda: 0,
) -> QuantizationChoice:
    """Settle `FastConfig.quantization` for a device.

    Args:
        requested: a scheme, `"auto"` or `"none"`.
        device: where the UNet is.
        dtype: dtype of its weights.
        parameters: how many it has; on CPUs small models lose by it.
        is_compiled: whether its regions get compiled.
        is_shared: whether a stock model that is still in use has the same weights, which would then be held twice.
        needed: counts the bytes of host memory that "auto" may only take if they are free.

    Raises:
        ValueError: a scheme, asked for by name, that the device, the dtype or what is loaded does not allow.
    """
    if requested == "none":
        return QuantizationChoice(None, "switched off by FastConfig.quantization")
    if requested == "auto":
        if device.type == "cpu":
            choice = _choose_on_cpu(dtype, parameters, is_compiled, is_shared)
        else:
            choice = _choose(device, dtype, is_compiled)
        if choice.scheme is None or (count := needed()) <= _SHARE_OF_MEMORY * (free_memory() or 2 * count):
            return choice
        why = f"no file holds the plain weights, and a copy of {count / 2**30:.1f} GiB does not fit in free memory"
        return QuantizationChoice(None, why)
    capability = _capability(device)
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
    if requested == "int8-dynamic" and device.type == "cpu":
        check_int8_units()
        if is_compiled:
            raise ValueError(
                "quantization='int8-dynamic' on CPU computes in oneDNN, whose packed weights the compiler does not "
                "take; use compile='auto' or 'off' with it and no unet.compile(), or quantization='none'."
            )
    reason = "asked for by FastConfig.quantization"
    if requested == "fp8-dynamic" and (slowly := why_no_fast_sums()) is not None:
        reason += f"; summed slowly, as {slowly}"
    return QuantizationChoice(requested, reason)


def why_no_fast_sums() -> str | None:
    """Why float8 products with a scale for each row must not sum in fewer bits, as is fastest, or None."""
    if not (torch.version.cuda or "").startswith("12.9"):
        return None
    return "its fast products by rows can fail in CUDA 12.9 (torchao issue 4582); builds for 12.6 and 13.0 are fine"


def _choose(device: torch.device, dtype: torch.dtype, is_compiled: bool) -> QuantizationChoice:
    capability = _capability(device)
    if capability is None:
        return QuantizationChoice(None, f"no scheme was measured to be faster than bfloat16 on {device.type}")
    if not is_compiled:
        return QuantizationChoice(None, "nothing is compiled, and quantizing inputs unfused costs more than is saved")
    if (why := _why_not(dtype)) is not None:
        return QuantizationChoice(None, why)
    if capability >= (8, 9) and (slowly := why_no_fast_sums()) is not None:
        return QuantizationChoice(None, f"no float8: {slowly}; ask for fp8-dynamic by name, which then sums slowly")
    if capability >= (8, 9):
        return QuantizationChoice("fp8-dynamic", f"float8 matrix units (capability {_dotted(capability)})")
    if capability >= (8, 0):
        return QuantizationChoice("int8-dynamic", f"int8 matrix units (capability {_dotted(capability)})")
    return QuantizationChoice(None, f"capability {_dotted(capability)} has no int8 or float8 matrix units")


def _choose_on_cpu(dtype: torch.dtype, parameters: int, is_compiled: bool, is_shared: bool) -> QuantizationChoice:
    units, why = int8_units(), None
    if units is None:
        why = "this CPU has no units for int8 products"
    elif dtype not in (torch.bfloat16, torch.float32):
        why = f"weights are {dtype}; quantization needs bfloat16 or float32"
    elif torch.cuda.is_available():
        # Layers that are quantized for a CPU cannot be moved, and `explain()` may come before `.to("cuda")`.
        why = "here is a GPU to move to, where the scheme is another; ask for int8-dynamic by name to stay on the CPU"
    elif is_compiled:
        why = "oneDNN's int8 products do not go into compiled regions"
    elif parameters < _MIN_PARAMETERS:
        why = f"{parameters / 1e6:.0f} M parameters: too small to gain from it"
    elif is_shared:
        why = "stock models share the weights, which would be held twice; ask for int8-dynamic by name"
    if why is not None:
        return QuantizationChoice(None, why)
    return QuantizationChoice("int8-dynamic", f"{units} int8 products")


def _why_not(dtype: torch.dtype) -> str | None:
    if dtype == torch.bfloat16:
        return None
    # By rows torchao's float8 products give bfloat16 and nothing else.
    return f"weights are {dtype}; quantization needs bfloat16: load with torch_dtype=torch.bfloat16"


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
