"""Packing a model in place, and taking it off again; and whether its weights are packed here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from ..models.adapters import adapter_modules
from .geglu import convert_geglu
from .packed import Packed, PackedConv2d, PackedGate, PackedLinear, is_packable

# Below this many parameters a model's layers are so small that the way through Python outweighs what is saved.
_MIN_PARAMETERS = 100_000_000


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
                module.give_up()
        return 0
    gates, adapters = convert_geglu(model), adapter_modules(model)
    linears = dict(_linears(model))
    for module in list(model.modules()):
        if id(module) in adapters or not is_packable(module):
            continue
        if type(module) is nn.Conv2d:
            PackedConv2d.make(module)
        elif id(module) in linears:
            (PackedGate if id(module) in gates else PackedLinear).make(module)
    return count_packed(model)


def count_packed(model: nn.Module) -> int:
    """The number of layers that are packed now."""
    return sum(isinstance(module, Packed) for module in model.modules())


def _linears(model: nn.Module) -> Iterator[tuple[int, str]]:
    """The linear layers of a model that run in every step of its transformers: their ids and names."""
    for stem, transformer in model.named_modules():
        if isinstance(transformer, Transformer2DModel):
            for name, module in transformer.named_modules():
                if isinstance(module, nn.Linear) and not is_of_context(name):
                    yield id(module), f"{stem}.{name}"


def is_of_context(name: str) -> bool:
    """Whether a layer, by its name, projects the context, which it does once a prompt."""
    return name.removesuffix(".base_layer").endswith(("attn2.to_k", "attn2.to_v"))
