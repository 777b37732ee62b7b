"""diffusers' GEGLU over a projection whose form has the gate in its product's epilogue."""

from __future__ import annotations

import torch
from diffusers.models.activations import GEGLU
from torch import nn


class GatedGEGLU(GEGLU):
    """`GEGLU` that leaves GELU and the product of value and gate to its projection, where that can do them."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As upstream. `hidden_states`: (..., channels)."""
        gated = getattr(self.proj, "gated", None)
        is_hooked = self.proj._forward_hooks or self.proj._forward_pre_hooks or "forward" in self.proj.__dict__
        if gated is None or is_hooked or (result := gated(hidden_states)) is None:
            return super().forward(hidden_states, *args, **kwargs)
        return result


def convert_geglu(model: nn.Module) -> dict[int, GEGLU]:
    """Make a model's GEGLUs `GatedGEGLU`; returns them by the ids of their projections, or of what these wrap."""
    found = {}
    for module in model.modules():
        if type(module) is GEGLU:
            module.__class__ = GatedGEGLU
        if isinstance(module, GEGLU):
            found[id(getattr(module.proj, "base_layer", module.proj))] = module
    return found
