"""Weights in the blocked layout that oneDNN computes in, as plain ones are reordered in every call on a CPU: whether
(`choice`), which layers (`apply`), and what they turn into (`layers`)."""

from .apply import apply_packing, count_packed
from .choice import PackingChoice, choose_packing
from .layers import PackedConv2d, PackedGate, PackedGEGLU, PackedLinear

__all__ = [
    "PackedConv2d",
    "PackedGEGLU",
    "PackedGate",
    "PackedLinear",
    "PackingChoice",
    "apply_packing",
    "choose_packing",
    "count_packed",
]
