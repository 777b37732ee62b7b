"""The places of a model whose layer may take another form on a CPU, and the forms there are.

Left out are the keys and values of the context, which are projected once a prompt, and the embeddings of time and of
added conditions, which steer every layer and cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..models.adapters import adapter_modules
from ..models.form import Form, Source
from ..models.storage import is_plain as is_plain_weight
from .geglu import GatedGEGLU
from .int8 import Int8, Int8Conv2d, Int8Gate, Int8Linear
from .packed import Packed, PackedConv2d, PackedGate, PackedLinear
from .torchao_form import TorchaoLinear

# Without measurements: some chips have but a reference kernel for convolutions that do not fill blocks of channels.
_BLOCK = 64
# Without measurements: below this many weights the way through Python costs more than is saved.
_MIN_WEIGHTS = 16_384


@dataclass(frozen=True)
class Candidate:
    """A form that layers may take.

    Attributes:
        name: how the plan and the file of measurements call it.
        lossless: whether results equal the plain layer's within rounding.
        takes: whether a layer, given by its name in the model, may take the form at all. Whether it gains by it is
            measured.
        make: makes a plain `nn.Linear`, `nn.Conv2d` or `GEGLU` one of this form, in place; `source` is where its plain
            weight comes back from.
    """

    name: str
    lossless: bool
    takes: Callable[[str, Any], bool]
    make: Callable[[Any, Source | None], None]


def places(model: nn.Module) -> dict[str, Any]:
    """The linear layers, convolutions and GEGLUs of a model that run in every step, by name, plain or in some form."""
    found: dict[str, Any] = {}
    inner, adapters = set(), adapter_modules(model)
    for name, module in model.named_modules():
        if id(module) in inner or id(module) in adapters:
            continue
        if isinstance(module, GEGLU) and _is_layer(layer_of(module)):
            found[name] = module
            inner.add(id(layer_of(module)))
        elif isinstance(module, nn.Conv2d) and _is_layer(module):
            found[name] = module
        elif isinstance(module, nn.Linear) and _is_layer(module) and _runs_every_step(name, model):
            found[name] = module
    return found


def layer_of(place: Any) -> Any:
    """The layer of a place: of a GEGLU its projection, or what an adapter wraps of it."""
    proj = place.proj if isinstance(place, GEGLU) else place
    return proj.get_base_layer() if isinstance(proj, BaseTunerLayer) else proj


def name_of_layer(name: str, place: Any) -> str:
    """The name of the layer of a place."""
    return f"{name}.proj" if isinstance(place, GEGLU) else name


def may_pack(name: str, place: Any) -> bool:
    """Everything that oneDNN packs; convolutions in channels_last, the format that packed ones return."""
    layer = layer_of(place)
    dtype, device = _kind(layer)
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return False
    if not isinstance(layer, nn.Conv2d):
        return True
    is_channels_last = isinstance(layer, Form) or layer.weight.is_contiguous(memory_format=torch.channels_last)
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and is_channels_last


def may_take_int8(name: str, place: Any) -> bool:
    """Linear layers and convolutions of more than one pixel.

    Left are the first and the last convolution, and those of one pixel, shortcuts of residual blocks mostly, whose
    errors are carried to the end: of all layers these add most to a step's error, and least to its time. In VAEs only
    what follows a norm is taken: between their blocks values grow large.
    """
    layer = layer_of(place)
    if not may_pack(name, place) or not isinstance(layer, nn.Conv2d):
        return may_pack(name, place)
    if layer.groups > 1 or layer.kernel_size == (1, 1) or name.rsplit(".", 1)[-1] in ("conv_in", "conv_out"):
        return False
    of_vae = name.startswith(("encoder.", "decoder."))
    return not of_vae or ".resnets." in name


def count_weights(place: Any) -> int:
    """How many numbers the weight of a place has."""
    layer = layer_of(place)
    return (layer.kind.shape if isinstance(layer, Form) else layer.weight.shape).numel()


def shipped_choice(name: str, place: Any, allowed: tuple[str, ...]) -> str:
    """The form that a place takes where nothing was measured: what won on the machines that were at hand."""
    layer = layer_of(place)
    if count_weights(place) < _MIN_WEIGHTS:
        return "plain"
    if isinstance(layer, nn.Conv2d) and (layer.in_channels % _BLOCK or layer.out_channels % _BLOCK):
        return "plain"
    fits = [each.name for each in CANDIDATES if each.name in allowed and each.takes(name, place)]
    return fits[-1] if fits else "plain"


def _make_packed(place: Any, source: Source | None) -> None:
    layer = layer_of(place)
    if layer is not place:
        place.__class__ = GatedGEGLU
        PackedGate.make(layer)
    else:
        (PackedConv2d if isinstance(layer, nn.Conv2d) else PackedLinear).make(layer)


def _make_int8(place: Any, source: Source | None) -> None:
    layer = layer_of(place)
    if layer is not place:
        place.__class__ = GatedGEGLU
        Int8Gate.make(layer, source)
    else:
        (Int8Conv2d if isinstance(layer, nn.Conv2d) else Int8Linear).make(layer, source)


PACKED = Candidate("packed", True, may_pack, _make_packed)
INT8 = Candidate("int8", False, may_take_int8, _make_int8)
# The later ones are the faster ones, where both were at hand.
CANDIDATES = (PACKED, INT8)


def form_of(place: Any) -> str:
    """The name of the form that a place has now."""
    layer = layer_of(place)
    return "packed" if isinstance(layer, Packed) else "int8" if isinstance(layer, Int8) else "plain"


def _is_layer(layer: Any) -> bool:
    """Whether a layer is a stock one, or of a form that it can turn back from."""
    if "forward" in layer.__dict__:
        return False  # somebody's own, which would ask a form for its weight
    if isinstance(layer, Form):
        return not isinstance(layer, TorchaoLinear) and (isinstance(layer, Packed) or layer.source is not None)
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return False
    return is_plain_weight(layer.weight) and layer.weight.device.type != "meta"


def _kind(layer: Any) -> tuple[torch.dtype, torch.device]:
    # Not by asking a form for its weight, which would end it.
    held = layer.kind if isinstance(layer, Form) else layer.weight
    return held.dtype, held.device


def _runs_every_step(name: str, model: nn.Module) -> bool:
    if name.removesuffix(".base_layer").endswith(("attn2.to_k", "attn2.to_v")):
        return False
    parents = name.split(".")[:-1]
    above = (model.get_submodule(".".join(parents[:depth])) for depth in range(len(parents), 0, -1))
    return any(isinstance(module, Transformer2DModel | Attention) for module in above)
