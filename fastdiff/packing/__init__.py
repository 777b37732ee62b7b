"""Weights in the blocked layout that oneDNN computes in, as plain ones are reordered in every call on a CPU: whether
(`choice`), which layers (`apply`), and what they turn into (`layers`).

Not here, because a step of SDXL's UNet took the same time with them: residual sums in the epilogues of attention's and
the feed-forward's last products, and residual blocks that write SiLU, the time embedding's sum and the shortcut's in
place. The residual blocks alone were 3 % faster at 512x512 (373 to 362 ms of a step of 2 s) and 2 % at 256x256.
"""

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
