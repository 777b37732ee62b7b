"""One truth, several forms: plain weights, packed or quantized ones made from them, and quantized checkpoints.

May import `models`.
"""

from .packed import PackedConv2d, PackedGate, PackedGEGLU, PackedLinear
from .packing import PackingChoice, apply_packing, choose_packing, count_packed
from .quantization import apply_quantization, plain_layers
from .record import Quantized
from .saved import load_quantized, quantized_scheme_of
from .schemes import QuantizationChoice, check_scheme, choose_quantization

__all__ = [
    "PackedConv2d",
    "PackedGEGLU",
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
    "load_quantized",
    "plain_layers",
    "quantized_scheme_of",
]
