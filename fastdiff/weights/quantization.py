"""Which layers are quantized, and quantizing them one at a time.

Eligible by role are the linear layers that run in every step inside of transformer blocks. Left are `conv_in` and
`conv_out`, time and added-condition embeddings, which steer every layer and cost next to nothing, `proj_in` and
`proj_out` beside the norms, the context's `to_k` and `to_v`, which run once a prompt, and convolutions. torchao has no
kernel for those of 3x3. oneDNN's (`onednn.qconv_pointwise`, unsigned input), timed alone with the quantizing of their
input, were 1.2 to 1.6 times as fast as packed bfloat16 at 8x8 and 16x16 with 640 or 1280 channels out, 1.04 times with
1280 in and out at 16x16, and 0.7 times at 32x32 with 320: a few per cent of a step at 256 pixels, less at larger sizes.
The 11 of 1x1 are the shortcuts of residual blocks, where errors are carried to the end; they stay convolutions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerRow,
    quantize_,
)

from .int8 import Int8Gate, Int8GEGLU, Int8Linear, convert_feed_forward
from .record import Quantized, weight_bytes
from .saved import save_quantized

# torchao: layers below this many weights cost more to quantize at run time than their smaller product saves.
_MIN_WEIGHTS = 512 * 512
# int8 on CPU, by measurement: quantizing the input costs what the product saves where neither side has as many
# features (1280 x 1280: 0.9 to 1.1 times packed bfloat16; 640 x 1920: 0.96; 2560 x 640: 1.6; 1280 x 10240: 1.4 to 2.0).
_MIN_WIDTH = 2048
# The largest value of a row is taken for at least this much.
_TINY = 1e-6


def apply_quantization(
    model: nn.Module, scheme: str, reason: str = "", *, min_width: int | None = None
) -> Quantized:
    """Quantize the eligible linear layers of a UNet or ControlNet in place, one layer at a time.

    Args:
        model: quantized once only.
        scheme: any but "auto" and "none".
        reason: for the record.
        min_width: in place of the measured least size, for measuring quality on small models.

    Returns:
        What was done; also kept as `model.quantized` if any layer was taken.
    """
    layers, left = plain_layers(model, scheme, min_width)
    before, model_before = sum(weight_bytes(layer) for layer in layers.values()), weight_bytes(model)
    if uses_onednn(scheme, model):
        gates = {id(module.proj): module for module in model.modules() if isinstance(module, GEGLU)}
        for layer in layers.values():
            gate = gates.get(id(layer))
            if gate is not None:
                gate.__class__ = Int8GEGLU
            (Int8Linear if gate is None else Int8Gate).quantize(layer)
        convert_feed_forward(model)
    else:
        quantize_(model, torchao_config(scheme), filter_fn=lambda _, name: name in layers)
    after = sum(weight_bytes(layer) for layer in layers.values())
    done = Quantized(scheme, len(layers), left, before, after, model_before, weight_bytes(model), reason)
    if layers:
        marked: Any = model
        marked.quantized = done
        marked.save_pretrained = functools.partial(save_quantized, model)
    return done


def plain_layers(
    model: nn.Module, scheme: str, min_width: int | None = None
) -> tuple[dict[str, nn.Linear], dict[str, int]]:
    """The layers that a scheme takes, by name, and how many linear layers it leaves, by reason."""
    is_large = _size_filter(scheme, model) if min_width is None else lambda layer: _width(layer) >= min_width
    taken: dict[str, nn.Linear] = {}
    left: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        why = None if type(module) is nn.Linear and is_plain(module) else "of another kind"
        if ".transformer_blocks." not in f".{name}":
            why = "outside of transformer blocks"
        elif name.endswith(("attn2.to_k", "attn2.to_v")):
            why = "once a prompt"
        elif why is None and not is_large(module):
            why = "too small to gain"
        if why is None:
            taken[name] = module
        else:
            left[why] = left.get(why, 0) + 1
    return taken, left


def is_plain(layer: nn.Linear) -> bool:
    """Whether a layer's weight is an ordinary tensor of its own kind, and not a quantized one."""
    return not isinstance(layer, Int8Linear) and type(layer.weight.data) is torch.Tensor


def uses_onednn(scheme: str, model: nn.Module) -> bool:
    """Whether `int8` computes a scheme; else torchao does."""
    return scheme == "int8-dynamic" and next(model.parameters()).device.type == "cpu"


def torchao_config(scheme: str):
    """torchao's configuration of a scheme."""
    # set_inductor_config=False: otherwise torchao writes inductor's global configuration.
    if scheme == "fp8-dynamic":
        # Without a floor the scale of a row of zeros is 0, and the row becomes NaN.
        return Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), activation_value_lb=_TINY, set_inductor_config=False
        )
    if scheme == "fp8-weight-only":
        return Float8WeightOnlyConfig(set_inductor_config=False)
    if scheme == "int8-dynamic":
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    return Int8WeightOnlyConfig(set_inductor_config=False)


def _size_filter(scheme: str, model: nn.Module) -> Callable[[nn.Linear], bool]:
    if uses_onednn(scheme, model):
        return lambda layer: _width(layer) >= _MIN_WIDTH
    return lambda layer: layer.in_features * layer.out_features >= _MIN_WEIGHTS


def _width(layer: nn.Linear) -> int:
    return max(layer.in_features, layer.out_features)
