"""One truth, several forms: plain weights, packed or quantized ones made from them, and quantized checkpoints.

May import `models`.
"""

from .merged import remember_plain, restore_plain
from .packed import PackedConv2d, PackedGate, PackedLinear
from .packing import PackingChoice, apply_packing, choose_packing, count_packed
from .quantization import (
    apply_quantization,
    check_scheme,
    fixed_scheme,
    memory_needed,
    plain_layers,
    remove_quantization,
)
from .record import Quantized
from .saved import load_quantized, quantized_scheme_of, save_quantized
from .schemes import QuantizationChoice, choose_quantization

__all__ = [
    "PackedConv2d",
    "PackedGate",
    "PackedLinear",
    "PackingChoice",
    "QuantizationChoice",
    "Quantized",
    "apply_packing",
    "apply_quantization",
    "check_scheme",
    "choose_packing",
    "choose_quantization",
    "count_packed",
    "fixed_scheme",
    "load_quantized",
    "memory_needed",
    "plain_layers",
    "quantized_scheme_of",
    "remember_plain",
    "remove_quantization",
    "restore_plain",
    "save_quantized",
]
