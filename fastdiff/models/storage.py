"""The tensors that hold the numbers of a packed or quantized weight, and how modules over them are copied."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight holds its own numbers, and not those of a quantized one."""
    is_made_of_others = hasattr(weight, "__tensor_flatten__")
    return not is_made_of_others and weight.dtype.is_floating_point and weight.dtype.itemsize > 1


def no_view(value: Any) -> Any:
    """A tensor that is a view of another one as a tensor of its own; all else as it is.

    Whether an input is a view, and of a tensor of which size, would become part of a compiled graph.
    """
    is_view = isinstance(value, torch.Tensor) and value._is_view() and not value.requires_grad
    return value.detach() if is_view else value


def leaves(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold a tensor's numbers: itself, or for a quantized one those inside of it."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from leaves(getattr(tensor, name))
    else:
        yield tensor


def deepcopy_sharing(module: M, shared: Iterable[torch.Tensor], memo: dict) -> M:
    """What a module's `__deepcopy__` returns whose packed weights torch cannot copy.

    Args:
        shared: tensors that the copy has as well; they must never be written to.
        memo: of `__deepcopy__`.
    """
    memo.update((id(tensor), tensor) for tensor in shared)
    twin = type(module).__new__(type(module))
    memo[id(module)] = twin
    twin.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return twin
