"""How a stock component becomes a fast one: new module objects over the same parameters."""

from __future__ import annotations

import copy
import weakref
from itertools import chain
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def share_weights(module: nn.Module, stock: type[nn.Module], fast: type[M]) -> M:
    """Copy the structure of `module` as class `fast`, with the very parameters and buffers of `module`.

    The stock module keeps its own processors and hooks; a change to the fast one does not reach it. The fast one's
    `shares_weights_with` refers to it, weakly, for as long as it lives.

    Args:
        module: an instance of `stock`, also wrapped by `torch.compile`.
        stock: the diffusers class that is expected.
        fast: the subclass to make.

    Raises:
        TypeError: if `module` is of another class.
    """
    module = getattr(module, "_orig_mod", module)
    if type(module) is not stock:
        raise TypeError(f"{fast.__qualname__}.from_stock takes a {stock.__name__}, not a {type(module).__name__}.")
    kept = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    twin: Any = copy.deepcopy(module, kept)
    twin.__class__ = fast
    twin.shares_weights_with = weakref.ref(module)
    return twin
