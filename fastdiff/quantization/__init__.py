"""Quantization: which scheme on which device (`choice`), which layers (`layers`), int8 products on CPUs (`int8`),
checkpoints (`checkpoint`), and what it costs in quality (`report`)."""

from .checkpoint import load_quantized, quantized_scheme_of
from .choice import QuantizationChoice, check_scheme, choose_quantization
from .layers import Quantized, apply_quantization, plain_layers

__all__ = [
    "Quantized",
    "QuantizationChoice",
    "apply_quantization",
    "check_scheme",
    "choose_quantization",
    "load_quantized",
    "plain_layers",
    "quantized_scheme_of",
]
