"""A recorder for the CPU that treats a function as a CUDA graph does: kernels are replayed, Python is not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdiff.graphs.recording import Recording


class _Tape(TorchDispatchMode):
    """Keeps each operator that runs with the memory it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # Detached: a tensor may get other memory later (`weight.data = ...`), which a graph would not see.
        self.calls.append(tree_map_only(torch.Tensor, torch.Tensor.detach, (func, args, kwargs or {}, result)))
        if not any(returned.alias_info for returned in func._schema.returns):
            self.nbytes += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if any(returned.alias_info for returned in func._schema.returns):
                continue  # a view of what is there already, or written in place
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


class TapeRecorder:
    """See `fastdiff.recording.Recorder`.

    Args:
        fails: raise when asked to record, as CUDA does when a function waits for the device.
        max_bytes: as of `Recorder`.
    """

    def __init__(self, device: str = "cpu", fails: bool = False, max_bytes: int = 2**30):
        self.device, self.fails, self.max_bytes = torch.device(device), fails, max_bytes
        self.recorded = self.replayed = self.forgotten = 0

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> Recording:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        with _Tape() as tape:
            outputs = function()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return Recording(replay, outputs, tape.nbytes)

    def forget(self) -> None:
        self.forgotten += 1

    def exclusive(self):
        return nullcontext()


class RunningRecorder(TapeRecorder):
    """A recorder for compiled code, which a tape does not see: it runs the function again."""

    def record(self, function: Callable[[], Any]) -> Recording:
        outputs = function()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for old, new in zip(tree_leaves(outputs), tree_leaves(function()), strict=True):
                old.copy_(new)

        return Recording(replay, outputs, 0)
