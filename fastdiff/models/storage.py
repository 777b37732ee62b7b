"""The tensors that hold the numbers of a packed or quantized weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def leaves(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold a tensor's numbers: itself, or for a quantized one those inside of it."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from leaves(getattr(tensor, name))
    else:
        yield tensor
