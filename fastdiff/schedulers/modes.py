"""What a stock step calls deep inside, answered otherwise: its noise, and its coefficients on the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class NoiseIs(TorchFunctionMode):
    """Within it, `torch.randn` answers with a given tensor."""

    def __init__(self, noise: torch.Tensor) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.noise if func is torch.randn else func(*args, **(kwargs or {}))


class _NoiseThroughPinnedMemory(TorchFunctionMode):
    """Within it, what `torch.randn` draws on the host is on its way to the device, the same numbers."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.randn:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "pin_memory": True}).to(self.device, non_blocking=True)


def noise_without_wait(generator: Any, device: torch.device) -> AbstractContextManager:
    """Context in which noise from a CPU generator reaches a CUDA device without a wait.

    Its numbers come from the host, so a copy per draw remains; a generator on the device needs none.

    Args:
        generator: a generator, a list of them, or None.
        device: where the noise is wanted.
    """
    first = generator[0] if isinstance(generator, list) and generator else generator
    if device.type == "cuda" and isinstance(first, torch.Generator) and first.device.type == "cpu":
        return _NoiseThroughPinnedMemory(device)
    return nullcontext()


class ScalarsOnHost(TorchFunctionMode):
    """Within it, code that works its coefficients out on the samples' device does so on the host.

    0-dimensional CPU tensors serve device tensors as they are. Only a sum with several weights, which stock
    writes as `einsum("k,bkc...->bc...", weights, tensors)`, has to be taken apart.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ones:
            return func(*args, **{**kwargs, "device": "cpu"})
        if func is torch.Tensor.to and args[0].ndim <= 1 and isinstance(args[-1], torch.device):
            return args[0]
        if func is torch.einsum:
            _, weights, tensors = args
            return sum(weight * tensor for weight, tensor in zip(weights, tensors.unbind(1), strict=True))
        return func(*args, **kwargs)
