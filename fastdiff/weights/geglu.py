"""diffusers' GEGLU over a projection whose form has the gate in its product's epilogue."""

from __future__ import annotations

import torch
from diffusers.models.activations import GEGLU
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..models.adapters import added_by, is_hooked, why_not_beside


class GatedGEGLU(GEGLU):
    """`GEGLU` that leaves GELU and the product of value and gate to its projection, where that can do them."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As upstream. `hidden_states`: (..., channels)."""
        result, added, proj = None, None, self.proj
        if isinstance(proj, BaseTunerLayer) and not is_hooked(proj) and why_not_beside(proj) is None:
            added, proj = added_by(proj, hidden_states), proj.get_base_layer()
        if not is_hooked(proj) and (gated := getattr(proj, "gated", None)) is not None:
            result = gated(hidden_states, added)
        return super().forward(hidden_states, *args, **kwargs) if result is None else result


def convert_geglu(model: nn.Module) -> dict[int, GEGLU]:
    """Make a model's GEGLUs `GatedGEGLU`; returns them by the ids of their projections, or of what these wrap."""
    found = {}
    for module in model.modules():
        if type(module) is GEGLU:
            module.__class__ = GatedGEGLU
        if isinstance(module, GEGLU):
            found[id(getattr(module.proj, "base_layer", module.proj))] = module
    return found
