"""Packing a model in place, and taking it off again; and whether its weights are packed here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from .packed import Packed
from .places import PACKED, form_of, layer_of, places
from .sources import Checkpoint

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
    if model.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return PackingChoice(False, "oneDNN packs no bfloat16 on this processor, but float32")
    if is_compiled:
        return PackingChoice(False, "compiled regions take plain weights")
    if requested is True:
        return PackingChoice(True, "asked for by FastConfig.pack_weights")
    parameters = sum(p.numel() for p in model.parameters())
    if parameters < _MIN_PARAMETERS:
        return PackingChoice(False, f"{parameters / 1e6:.0f} M parameters: too small to gain from it")
    if is_shared:
        return PackingChoice(False, "stock models share the weights, which would be held twice; ask with True")
    return PackingChoice(True, "oneDNN's own layout, and GEGLU in the product's epilogue")


def apply_packing(model: nn.Module, chosen: Collection[str]) -> int:
    """Pack layers of a model in place, one at a time, and take packing off the others.

    Args:
        chosen: names of places, see `places`; of those that are quantized none is touched.

    Returns:
        The number of packed layers.
    """
    found = places(model)
    for name, place in found.items():
        if name not in chosen and form_of(place) == "packed":
            layer_of(place).give_up()
    fresh = [place for name, place in found.items() if name in chosen and form_of(place) == "plain"]
    for place in Checkpoint(model).converting(fresh):
        PACKED.make(place, None)
    return count_packed(model)


def count_packed(model: nn.Module) -> int:
    """The number of layers that are packed now."""
    return sum(isinstance(module, Packed) for module in model.modules())


def is_of_context(name: str) -> bool:
    """Whether a layer, by its name, projects the context, which it does once a prompt."""
    return name.removesuffix(".base_layer").endswith(("attn2.to_k", "attn2.to_v"))
