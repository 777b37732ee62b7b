"""channels_last: convolutions in NHWC, the format that their fast kernels compute in."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from ..identity import StandIn, stands_in_for
from .group_norm import ChannelsLastGroupNorm


@stands_in_for(Transformer2DModel)
class ChannelsLastTransformer2DModel(Transformer2DModel, metaclass=StandIn):
    """diffusers' `Transformer2DModel`, which leaves its result in channels_last.

    Upstream copies it to NCHW, of which the next convolution makes NHWC again. Removable once upstream does not ask for
    contiguous memory there.
    """

    def _get_output_for_continuous_inputs(self, hidden_states, residual, batch_size, height, width, inner_dim):
        """Upstream's hook: project tokens, (batch, height * width, inner_dim), to a picture and add the residual."""
        if not self.use_linear_projection:
            return self.proj_out(_as_picture(hidden_states, height, width)) + residual
        return _as_picture(self.proj_out(hidden_states), height, width) + residual


def apply_channels_last(model: nn.Module, enabled: bool, own_norms: bool = False) -> None:
    """Bring a model's convolutions into NHWC, or back into NCHW; a model that is there already is left as it is.

    Args:
        own_norms: have GroupNorms keep that format, too, by our kernels.
    """
    module: Any
    for module in model.modules():
        if enabled and own_norms and type(module) is nn.GroupNorm:
            module.__class__ = ChannelsLastGroupNorm
        elif not (enabled and own_norms) and type(module) is ChannelsLastGroupNorm:
            module.__class__ = nn.GroupNorm  # type: ignore[assignment]  # its own base
        if enabled and type(module) is Transformer2DModel:
            module.__class__ = ChannelsLastTransformer2DModel
        elif not enabled and type(module) is ChannelsLastTransformer2DModel:
            module.__class__ = Transformer2DModel
    wanted = torch.channels_last if enabled else torch.contiguous_format
    model.to(memory_format=wanted)  # type: ignore[call-overload]  # torch's stubs ask for keywords of other overloads too


def _as_picture(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
