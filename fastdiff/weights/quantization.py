"""Which layers are quantized, and quantizing them one at a time.

torchao's schemes take linear layers inside of transformer blocks, and leave `proj_in` and `proj_out` beside the norms.
oneDNN's int8 takes the places of `places`, convolutions too, as far as they are chosen.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..models.adapters import adapter_modules
from ..models.form import Form
from ..models.storage import is_plain
from .int8 import Int8, convert_feed_forward
from .packed import Packed
from .packing import is_of_context
from .places import INT8, form_of, layer_of, name_of_layer, places
from .record import Quantized
from .sources import Checkpoint
from .torchao_form import TorchaoLinear

# torchao: layers below this many weights cost more to quantize at run time than their smaller product saves.
_MIN_WEIGHTS = 512 * 512


@torch.no_grad()
def apply_quantization(
    model: nn.Module,
    scheme: str,
    reason: str = "",
    *,
    min_weights: int = _MIN_WEIGHTS,
    chosen: Collection[str] | None = None,
) -> Quantized:
    """Quantize the eligible layers of a UNet, ControlNet or VAE in place, one layer at a time.

    Layers that have this form already keep it; those of another scheme, or not chosen, are given up first.

    Args:
        scheme: any but "auto" and "none".
        reason: for the record.
        min_weights: of a layer that torchao quantizes, for measuring quality on small models.
        chosen: names of the places that oneDNN's int8 is to take; all that may take it if None.

    Returns:
        What is quantized now; also kept as `model.quantized` if any layer is.
    """
    remove_quantization(model, keep=scheme)
    onednn, checkpoint = uses_onednn(scheme, model), Checkpoint(model)
    if onednn:
        taken, left = _int8_places(model, chosen)
        fresh = [(name, place) for name, place in taken.items() if form_of(place) != "int8"]
        for name, place in checkpoint.converting(fresh):
            INT8.make(place, checkpoint.source(name_of_layer(name, place), layer_of(place).weight))
        convert_feed_forward(model)
    else:
        layers, left = plain_layers(model, scheme, min_weights)
        for name, layer in checkpoint.converting(layers.items()):
            TorchaoLinear.quantize(layer, checkpoint.source(name, layer.weight), scheme)
    done = Quantized.of(model, scheme, left, reason)
    model.quantized = done if done.taken else None  # type: ignore[assignment]  # not a module
    return done


def _int8_places(model: nn.Module, chosen: Collection[str] | None) -> tuple[dict[str, Any], dict[str, int]]:
    """The places that oneDNN's int8 takes, and how many it leaves, by reason; those not chosen become plain."""
    taken: dict[str, Any] = {}
    left: dict[str, int] = {}
    for name, place in places(model).items():
        may = INT8.takes(name, place)
        if may and (chosen is None or name in chosen):
            taken[name] = place
            continue
        if form_of(place) == "int8":
            layer_of(place).give_up()
        why = "no faster here" if may else "for precision"
        left[why] = left.get(why, 0) + 1
    if of_context := sum(is_of_context(name) for name, _ in model.named_modules()):
        left["once a prompt"] = of_context
    return taken, left


def remove_quantization(model: nn.Module, keep: str | None = None) -> None:
    """Give up the quantized forms of a model, but for those of the scheme `keep` and those without plain weights."""
    for module in list(model.modules()):
        if isinstance(module, TorchaoLinear | Int8) and module.source is not None and scheme_of(module) != keep:
            module.give_up()
    if keep is None and not any(isinstance(module, TorchaoLinear | Int8) for module in model.modules()):
        model.quantized = None  # type: ignore[assignment]  # not a module


def scheme_of(layer: Form) -> str:
    """The scheme of a quantized layer."""
    return layer.scheme if isinstance(layer, TorchaoLinear) else "int8-dynamic"


def memory_needed(model: nn.Module) -> int:
    """Bytes of host memory that quantizing adds where no file holds the plain weights; nothing where one does.

    On CPUs the quantized weights come beside the plain ones, elsewhere copies of these.
    """
    if Checkpoint(model).files:
        return 0
    first = next(model.parameters())
    if first.device.type == "cpu":
        taken = (layer_of(place) for name, place in places(model).items() if INT8.takes(name, place))
        return sum(layer.weight.numel() for layer in taken if not isinstance(layer, Form))
    plain = plain_layers(model, "int8-dynamic")[0].values()
    return sum(layer.in_features * layer.out_features for layer in plain) * first.element_size()


def plain_layers(
    model: nn.Module, scheme: str, min_weights: int = _MIN_WEIGHTS
) -> tuple[dict[str, Any], dict[str, int]]:
    """The layers that a scheme takes, by name, and how many it leaves, by reason."""
    if uses_onednn(scheme, model):
        found, left = _int8_places(model, None)
        found = {name_of_layer(name, place): layer_of(place) for name, place in found.items()}
        return {name: layer for name, layer in found.items() if not isinstance(layer, Int8)}, left
    adapters = adapter_modules(model)
    taken: dict[str, Any] = {}
    left = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or id(module) in adapters or isinstance(module, TorchaoLinear | Int8):
            continue
        # A packed weight is a plain one in another layout; what a user quantized is not.
        plain = isinstance(module, Packed) or (type(module) is nn.Linear and is_plain(module.weight))
        why = None if plain else "of another kind"
        if ".transformer_blocks." not in f".{name}":
            why = "outside of transformer blocks"
        elif is_of_context(name):
            why = "once a prompt"
        elif why is None and module.in_features * module.out_features < min_weights:
            why = "too small to gain"
        if why is None:
            taken[name] = module
        else:
            left[why] = left.get(why, 0) + 1
    return taken, left


def uses_onednn(scheme: str, model: nn.Module) -> bool:
    """Whether `int8` computes a scheme; else torchao does."""
    return scheme == "int8-dynamic" and next(model.parameters()).device.type == "cpu"


def check_scheme(model: nn.Module, requested: str) -> None:
    """Refuse another scheme than the one that a model was loaded quantized with: it has no plain weights.

    Args:
        model: a UNet or ControlNet, quantized or not.
        requested: `FastConfig.quantization`; `"auto"` goes with every scheme.

    Raises:
        ValueError: naming both schemes.
    """
    fixed = fixed_scheme(model)
    if fixed is not None and requested not in ("auto", fixed):
        raise ValueError(
            f"quantization={requested!r}, but this {type(model).__name__} was loaded quantized with {fixed!r} and has "
            f"no plain weights. Load the checkpoint that it was made from, or use quantization='auto' or {fixed!r}."
        )


def fixed_scheme(model: nn.Module) -> str | None:
    """The scheme that a model was loaded quantized with, so that it has no plain weights; None for all others."""
    layers = (module for module in model.modules() if isinstance(module, TorchaoLinear | Int8))
    return next((scheme_of(layer) for layer in layers if layer.source is None), None)
