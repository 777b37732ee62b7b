"""What fast models return by default: plain tuples, which also answer as diffusers' output objects do."""

from __future__ import annotations

from typing import Any


def answers_by_name(cls: Any) -> Any:
    """Class decorator for a `NamedTuple`: add the ways in which a diffusers output object is read.

    `output["sample"]`, `keys()`, `values()`, `items()` and `to_tuple()`, beside `output.sample` and `output[0]`, which
    a named tuple has. diffusers' own objects are dictionaries, which the compiler takes less well to.
    """
    by_index = tuple.__getitem__

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else by_index(self, key)

    cls.__getitem__ = __getitem__
    cls.keys = lambda self: self._fields
    cls.values = cls.to_tuple = lambda self: tuple(self)
    cls.items = lambda self: tuple(zip(self._fields, self, strict=True))
    return cls
