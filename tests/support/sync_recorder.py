"""Records every wait for the device and every copy to or from it, as CUDA would have them, without a GPU.

with SyncRecorder() as recorder:
    x = recorder.on_device(torch.ones(3))
    x.sum().item()
assert [event.name for event in recorder.waits()] == ["item"]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from .device_tensor import DeviceFunctions, DeviceOperators, DeviceTensor, Record

_NOT_A_PLACE = (str(Path(torch.__file__).parent), __file__, str(Path(__file__).with_name("device_tensor.py")))


class _Stream:
    """What `torch.cuda.current_stream()` gives, as far as it can be waited for."""

    cuda_stream = 0  # the address that tells one stream from another

    def __init__(self, record: Record) -> None:
        self._record = record

    def synchronize(self) -> None:
        self._record("synchronize", True)


@dataclass(frozen=True)
class Event:
    """One thing that CUDA would have done between host and device.

    Attributes:
        name: what it was: "item", "nonzero", "mask", "host to device", "device to host", ...
        wait: whether the host waits for the device.
        where: "package/path/to/file.py:line" of the innermost frame outside torch.
        phase: the recorder's `phase` at that time.
    """

    name: str
    wait: bool
    where: str
    phase: str


class SyncRecorder:
    """Context manager: runs what is in it on `DeviceTensor`s, with the CPU's results, and lists `events`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.phase = ""
        self._stack = ExitStack()

    def __enter__(self) -> SyncRecorder:
        self._stack.enter_context(DeviceFunctions(self._record))
        self._stack.enter_context(DeviceOperators(self._record))
        # A build without CUDA has no streams.
        self._stack.enter_context(patch.object(torch.cuda, "current_stream", lambda device=None: _Stream(self._record)))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def waits(self, phase: str | None = None) -> list[Event]:
        """The recorded waits, of one phase or of all."""
        return [event for event in self.events if event.wait and phase in (None, event.phase)]

    def copies(self, phase: str | None = None) -> list[Event]:
        """The recorded copies from host to device, waiting or not, of one phase or of all."""
        return [e for e in self.events if e.name == "host to device" and phase in (None, e.phase)]

    @staticmethod
    def on_device(tensor: torch.Tensor) -> DeviceTensor:
        """Put a tensor on the device without recording it."""
        return tensor if isinstance(tensor, DeviceTensor) else DeviceTensor(tensor.detach())

    @classmethod
    def place(cls, *modules: nn.Module) -> None:
        """Put all parameters and buffers of modules on the device without recording it."""
        placed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in placed:
                twin = cls.on_device(tensor)
                if isinstance(tensor, nn.Parameter):
                    twin = nn.Parameter(twin, requires_grad=False)
                placed[id(tensor)] = tensor, twin  # kept alive: its id must not be used again
            return placed[id(tensor)][1]

        with cls():
            for module in (inner for outer in modules for inner in outer.modules()):
                for tensors in (module._parameters, module._buffers):
                    tensors.update({name: moved(t) for name, t in tensors.items() if t is not None})

    @contextmanager
    def watch(self, pipe: Any) -> Iterator[None]:
        """Set `phase` as a pipeline runs: "before"; "loop" from its first UNet call, "after" from decode."""
        self.phase = "before"
        components = ((pipe.unet, "forward", "loop"), (pipe.vae, "decode", "after"))
        for component, name, phase in components:
            setattr(component, name, self._announcing(getattr(component, name), phase))
        try:
            yield
        finally:
            for component, name, _ in components:
                delattr(component, name)

    def _announcing(self, method, phase: str):
        def call(*args, **kwargs):
            self.phase = phase
            return method(*args, **kwargs)

        return call

    def _record(self, name: str, wait: bool) -> None:
        self.events.append(Event(name, wait, _place_in_source(), self.phase))


def _place_in_source() -> str:
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_A_PLACE):
        frame = frame.f_back
    if frame is None:
        return "unknown:0"
    path = frame.f_code.co_filename
    for package in ("diffusers", "transformers", "fastdiff", "tests"):
        _, found, rest = path.rpartition(f"/{package}/")
        if found:
            return f"{package}/{rest}:{frame.f_lineno}"
    return f"{path}:{frame.f_lineno}"
