"""What weights were before adapters were merged into them: to take these out again in floating point leaves a rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .sources import Checkpoint


def remember_plain(model: nn.Module) -> None:
    """Note where the weights of layers with adapters come from, before adapters are merged into them."""
    checkpoint = Checkpoint(model)
    for name, layer in _adapted(model):
        if not layer.merged:
            layer.__dict__["unmerged_source"] = checkpoint.source(name, layer.get_base_layer().weight, copy=True)


@torch.no_grad()
def restore_plain(model: nn.Module) -> None:
    """Give layers that hold no merged adapter any more the very weights that they had before."""
    for _, layer in _adapted(model):
        if not layer.merged and (source := layer.__dict__.pop("unmerged_source", None)) is not None:
            layer.get_base_layer().weight.copy_(source.read())


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in list(model.named_modules()) if isinstance(layer, BaseTunerLayer))
