"""Adapters: what belongs to them, and when they are being attached, which reads no weight but looks at every one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
