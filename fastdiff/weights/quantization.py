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

from collections.abc import Callable

import torch
from torch import nn

from ..models.adapters import adapter_modules
from ..models.form import Form
from .geglu import convert_geglu
from .int8 import Int8, Int8Gate, Int8Linear, convert_feed_forward
from .packed import Packed
from .packing import is_of_context
from .record import Quantized
from .sources import Checkpoint
from .torchao_form import TorchaoLinear

# torchao: layers below this many weights cost more to quantize at run time than their smaller product saves.
_MIN_WEIGHTS = 512 * 512
# int8 on CPU, by measurement: quantizing the input costs what the product saves where neither side has as many
# features (1280 x 1280: 0.9 to 1.1 times packed bfloat16; 640 x 1920: 0.96; 2560 x 640: 1.6; 1280 x 10240: 1.4 to 2.0).
_MIN_WIDTH = 2048


@torch.no_grad()
def apply_quantization(
    model: nn.Module, scheme: str, reason: str = "", *, min_width: int | None = None
) -> Quantized:
    """Quantize the eligible linear layers of a UNet or ControlNet in place, one layer at a time.

    Layers that have this form already keep it; those of another scheme are given up first.

    Args:
        scheme: any but "auto" and "none".
        reason: for the record.
        min_width: in place of the measured least size, for measuring quality on small models.

    Returns:
        What is quantized now; also kept as `model.quantized` if any layer is.
    """
    remove_quantization(model, keep=scheme)
    layers, left = plain_layers(model, scheme, min_width)
    gates, checkpoint = convert_geglu(model), Checkpoint.of(model if layers else None)
    onednn = uses_onednn(scheme, model)
    for name, layer in layers.items():
        source = checkpoint.source(name, layer.weight)
        if onednn:
            (Int8Gate if id(layer) in gates else Int8Linear).make(layer, source)
        else:
            TorchaoLinear.quantize(layer, source, scheme)
    if onednn:
        convert_feed_forward(model)
    done = Quantized.of(model, scheme, left, reason)
    model.quantized = done if done.taken else None  # type: ignore[assignment]  # not a module
    return done


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
    if Checkpoint.of(model).files:
        return 0
    plain = plain_layers(model, "int8-dynamic")[0].values()
    weights = sum(layer.in_features * layer.out_features for layer in plain)
    first = next(model.parameters())
    return weights if first.device.type == "cpu" else weights * first.element_size()


def plain_layers(
    model: nn.Module, scheme: str, min_width: int | None = None
) -> tuple[dict[str, nn.Linear], dict[str, int]]:
    """The layers that a scheme takes, by name, and how many linear layers it leaves, by reason."""
    is_large = _size_filter(scheme, model) if min_width is None else lambda layer: _width(layer) >= min_width
    adapters = adapter_modules(model)
    taken: dict[str, nn.Linear] = {}
    left: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or id(module) in adapters or isinstance(module, TorchaoLinear | Int8):
            continue
        why = None if is_plain(module) else "of another kind"
        if ".transformer_blocks." not in f".{name}":
            why = "outside of transformer blocks"
        elif is_of_context(name):
            why = "once a prompt"
        elif why is None and not is_large(module):
            why = "too small to gain"
        if why is None:
            taken[name] = module
        else:
            left[why] = left.get(why, 0) + 1
    return taken, left


def is_plain(layer: nn.Linear) -> bool:
    """Whether a layer's weight is an ordinary tensor of its own kind, packed or not, and not a quantized one."""
    if isinstance(layer, Packed):
        return True
    return type(layer) is nn.Linear and type(layer.weight.data) is torch.Tensor


def uses_onednn(scheme: str, model: nn.Module) -> bool:
    """Whether `int8` computes a scheme; else torchao does."""
    return scheme == "int8-dynamic" and next(model.parameters()).device.type == "cpu"


def _size_filter(scheme: str, model: nn.Module) -> Callable[[nn.Linear], bool]:
    if uses_onednn(scheme, model):
        return lambda layer: _width(layer) >= _MIN_WIDTH
    return lambda layer: layer.in_features * layer.out_features >= _MIN_WEIGHTS


def _width(layer: nn.Linear) -> int:
    return max(layer.in_features, layer.out_features)


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
