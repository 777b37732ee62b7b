"""Packing a model in place, and taking it off again; and whether its weights are packed here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .packed import Packed, PackedConv2d, PackedGate, PackedGEGLU, PackedLinear, is_packable

# Below this many parameters a model's layers are so small that the way through Python outweighs what is saved.
_MIN_PARAMETERS = 100_000_000
_QKV = ("to_qkv", "to_q", "to_k", "to_v")


@dataclass(frozen=True)
class PackingChoice:
    """Whether to pack, and why, or why not."""

    enabled: bool
    reason: str


def choose_packing(
    requested: str | bool, model: nn.Module, device: torch.device, *, is_compiled: bool, is_shared: bool
) -> PackingChoice:
    """Settle `FastConfig.pack_weights` for a UNet.

    Args:
        requested: `"auto"`, True or False.
        model: the UNet.
        device: where it runs.
        is_compiled: whether the compiler lays out the weights.
        is_shared: whether a stock model that is still in use has the same weights, which would then be held twice.
    """
    if requested is False:
        return PackingChoice(False, "switched off by FastConfig.pack_weights")
    if device.type != "cpu":
        return PackingChoice(False, f"weights need no other layout on {device.type}")
    if not torch.backends.mkldnn.is_available():
        return PackingChoice(False, "this build of PyTorch has no oneDNN")
    if model.dtype not in (torch.bfloat16, torch.float32):
        return PackingChoice(False, f"oneDNN packs bfloat16 and float32, and weights are {model.dtype}")
    if is_compiled:
        return PackingChoice(False, "compiled regions take plain weights")
    if requested is True:
        return PackingChoice(True, "asked for by FastConfig.pack_weights")
    parameters = sum(p.numel() for p in model.parameters())
    if parameters < _MIN_PARAMETERS:
        return PackingChoice(False, f"{parameters / 1e6:.0f} M parameters: too small to gain from it")
    if is_shared:
        return PackingChoice(False, "stock models share the weights, which would be held twice; ask with True")
    if model.dtype == torch.bfloat16 and not torch.cpu.get_capabilities().get("amx_bf16", False):
        return PackingChoice(False, "not measured on CPUs without AMX; ask with True")
    return PackingChoice(True, "oneDNN's own layout, and GEGLU in the product's epilogue")


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
    dormant: set[int] = set()
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            # Adapters are small and get edited; what they wrap is not.
            dormant.update(id(child) for child in module.modules() if child is not module.get_base_layer())
        elif {"to_qkv", "to_q"} <= module._modules.keys():
            # With a merged LoRA the parts stay beside the fused projection, over its storage.
            dormant.update(id(child) for name in _QKV for child in getattr(module, name).modules())
    for name, module in list(transformer.named_modules()):
        of_context = ".attn2.to_k." in f"{name}." or ".attn2.to_v." in f"{name}."
        if type(module) is nn.Linear and id(module) not in dormant and not of_context and is_packable(module):
            PackedLinear.pack(module)
