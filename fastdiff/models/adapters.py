"""Adapters: what belongs to them, and when they are being attached, which reads no weight but looks at every one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_attaching: ContextVar[bool] = ContextVar("fastdiff_attaching", default=False)


@contextmanager
def attaching() -> Iterator[None]:
    """While adapters are put on: whoever asks for a weight wants to know its shape, dtype and device alone."""
    token = _attaching.set(True)
    try:
        yield
    finally:
        _attaching.reset(token)


def is_attaching() -> bool:
    """Whether weights may be answered for by stand-ins."""
    return _attaching.get()


def adapter_modules(model: nn.Module) -> set[int]:
    """The ids of the modules that adapters consist of: small, and edited; what they wrap is not among them."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            found.update(id(child) for child in module.modules() if child is not base)
    return found


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody wants to see, or changes, what this layer alone computes."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)


def why_not_beside(layer: BaseTunerLayer) -> str | None:
    """Why what a layer's adapters add cannot be computed apart from its base product; None where it can."""
    special = set(getattr(layer, "lora_variant", ())) & set(layer.active_adapters)
    if special:
        return f"adapter {sorted(special)[0]!r} is more than a sum"
    if isinstance(layer, LycorisLayer):
        dropouts = (*layer.rank_dropout.values(), *layer.module_dropout.values())
        return "its adapter drops out while training" if layer.training and any(dropouts) else None
    return None if isinstance(layer, LoraLayer) else f"its adapter is a {type(layer).__name__}"


def added_by(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """What the active adapters of a layer add to its base product, or None if nothing.

    Args:
        layer: of peft's LoRA, LoHa or LoKr.
        x: the layer's input, (..., in_features).
    """
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as peft does in its own call
    if layer.disable_adapters or layer.merged:
        return None
    total = None
    for name in layer.active_adapters:
        if name in getattr(layer, "lora_A", ()):
            down, up = layer.lora_A[name], layer.lora_B[name]
            part = up(down(layer.lora_dropout[name](x.to(down.weight.dtype)))) * layer.scaling[name]
        elif isinstance(layer, LycorisLayer) and name in layer.rank_dropout:
            with attaching():  # it asks for the base weight's shape
                part = F.linear(x, layer.get_delta_weight(name).to(x.dtype))
        else:
            continue
        total = part if total is None else total + part
    return None if total is None else total.to(x.dtype)
