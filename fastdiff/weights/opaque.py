"""How modules are copied whose packed weights torch cannot copy."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


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
