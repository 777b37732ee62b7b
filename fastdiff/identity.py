"""Lets a subclass pass for its stock class wherever diffusers looks classes up by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", bound=type)


def stands_in_for(stock: type) -> Callable[[T], T]:
    """Class decorator: give a subclass the `__name__` and `__module__` of the diffusers class that it replaces.

    diffusers writes `type(component).__name__` and `__module__` into `model_index.json` and `config.json`, and keys
    LoRA, single-file and loading tables by them. With the stock names a checkpoint saved from fast components loads
    in stock diffusers with fastdiff not installed, and every such table finds its entry. `__qualname__` stays, so
    `repr(cls)` still shows the fast class. Removable once diffusers resolves subclasses by their bases.

    Args:
        stock: the diffusers class; the decorated class must derive from it.

    Raises:
        TypeError: if the decorated class does not derive from `stock`.
    """

    def rename(cls: T) -> T:
        if not issubclass(cls, stock):
            raise TypeError(f"{cls.__qualname__} must derive from {stock.__name__} to stand in for it.")
        cls.__name__ = stock.__name__
        cls.__module__ = stock.__module__
        return cls

    return rename
