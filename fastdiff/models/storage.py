"""The tensors that hold the numbers of a packed or quantized weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight holds its own numbers, and not those of a quantized one."""
    return type(weight.data) is torch.Tensor and weight.dtype.is_floating_point and weight.dtype.itemsize > 1


def quantized_by_hand(model: nn.Module) -> int:
    """How many layers of a model hold weights that the user, or diffusers' loading, has quantized."""
    if getattr(model, "quantized", None) is not None:
        return 0
    layers = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if not is_plain(parameter)}
    return len(layers)


def leaves(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold a tensor's numbers: itself, or for a quantized one those inside of it."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from leaves(getattr(tensor, name))
    else:
        yield tensor
