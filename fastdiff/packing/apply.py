"""Packing a model in place, and taking it off again."""

from __future__ import annotations

from diffusers.models.activations import GEGLU
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .layers import Packed, PackedConv2d, PackedGate, PackedGEGLU, PackedLinear, is_packable

_QKV = ("to_qkv", "to_q", "to_k", "to_v")


def apply_packing(model: nn.Module, enabled: bool) -> int:
    """Pack the eligible layers of a model in place, one at a time, or take packing off again.

    Eligible are plain linear layers inside of transformers, but for the keys and values of the context, which are
    projected once a prompt; and plain convolutions in channels_last, the format that packed ones return.

    Returns:
        The number of packed layers.
    """
    if not enabled:
        for module in model.modules():
            if isinstance(module, Packed):
                module.unpack()
        return 0
    for module in list(model.modules()):
        if type(module) is GEGLU:
            module.__class__ = PackedGEGLU
        if isinstance(module, GEGLU) and is_packable(module.proj):
            PackedGate.pack(module.proj)
    for module in list(model.modules()):
        if isinstance(module, Transformer2DModel):
            _pack_linears(module)
        elif type(module) is nn.Conv2d and is_packable(module):
            PackedConv2d.pack(module)
    return count_packed(model)


def count_packed(model: nn.Module) -> int:
    """The number of layers that are packed now."""
    return sum(isinstance(module, Packed) for module in model.modules())


def _pack_linears(transformer: Transformer2DModel) -> None:
    dormant = set()
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            # Adapters are small and get edited; what they wrap is not.
            dormant.update(id(child) for child in module.modules() if child is not module.get_base_layer())
        elif hasattr(module, "to_qkv") and hasattr(module, "to_q"):
            # With a merged LoRA the parts stay beside the fused projection, over its storage.
            dormant.update(id(child) for name in _QKV for child in getattr(module, name).modules())
    for name, module in list(transformer.named_modules()):
        of_context = ".attn2.to_k." in f"{name}." or ".attn2.to_v." in f"{name}."
        if type(module) is nn.Linear and id(module) not in dormant and not of_context and is_packable(module):
            PackedLinear.pack(module)
