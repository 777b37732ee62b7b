"""Lets a subclass pass for its stock class wherever diffusers looks classes up."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T", bound=type)


class StandIn(type):
    """The metaclass of a class that stands in: it compares equal to the class that it replaces.

    `from_pipe` of stock pipelines takes over the components whose `type()` is in the list that it expects, and
    registries are dictionaries of classes. `is` still tells the two apart.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is not None and cls.__dict__.get("_replaces") is other)

    def __hash__(cls) -> int:
        replaced = cls.__dict__.get("_replaces")
        return type.__hash__(cls) if replaced is None else hash(replaced)


def stands_in_for(stock: type) -> Callable[[T], T]:
    """Class decorator: give a subclass the `__name__` and `__module__` of the diffusers class that it replaces.

    diffusers writes `type(component).__name__` and `__module__` into `model_index.json` and `config.json`, and keys
    LoRA, single-file and loading tables by them. With the stock names a checkpoint saved from fast components loads
    in stock diffusers with fastdiff not installed, and every such table finds its entry. `__qualname__` stays, so
    `repr(cls)` still shows the fast class, and classes and objects pickle under its own name. Removable once diffusers
    resolves subclasses by their bases.

    Args:
        stock: the diffusers class; the decorated class must derive from it, and have the metaclass `StandIn`.

    Raises:
        TypeError: if the decorated class does not derive from `stock`.
    """

    def rename(cls: Any) -> Any:
        if not issubclass(cls, stock):
            raise TypeError(f"{cls.__qualname__} must derive from {stock.__name__} to stand in for it.")
        cls._home, cls._replaces = cls.__module__, stock
        cls.__name__ = stock.__name__
        cls.__module__ = stock.__module__
        return cls

    return rename


def _find(home: str, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), import_module(home))


def _pickle_class(cls: type) -> str | tuple:
    # A user's subclass is found where it says it is.
    return (_find, (cls.__dict__["_home"], cls.__qualname__)) if "_home" in cls.__dict__ else cls.__qualname__


# pickle finds classes by name, and the name is the stock one.
copyreg.pickle(StandIn, _pickle_class)
