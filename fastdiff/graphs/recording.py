"""Records what a function does on a device, so that it can be done again without running any Python."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# Of the device's memory, for all graphs of a pool.
_MEMORY_SHARE = 0.25
# Compiles, lets cuDNN and cuBLAS choose and allocate; a recording must do none of it.
_WARM_UP_CALLS = 2
# CUDA can record one graph at a time in a process, whatever pipeline or GPU it is for.
capturing = threading.RLock()


@dataclass(frozen=True)
class Recording:
    """What a recorder made of a function.

    Attributes:
        replay: does the work again, on what the buffers hold then.
        outputs: what the function returned; every replay writes into these very tensors.
        nbytes: memory that it has taken in addition to that of earlier recordings.
    """

    replay: Callable[[], object]
    outputs: Any
    nbytes: int


class Recorder(Protocol):
    """Records functions without arguments for one device."""

    device: torch.device
    max_bytes: int

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Call the function as often as it takes to be ready; returns the last result."""

    def record(self, function: Callable[[], Any]) -> Recording:
        """Record the function. After an error the recorder can be used again."""

    def forget(self) -> None:
        """Take no memory of earlier recordings for the next ones: all of them are gone."""

    def exclusive(self) -> AbstractContextManager:
        """Put what the current thread does on the device after what others did before within it."""


@contextmanager
def searching_kernels():
    """Have cuDNN time its kernels for shapes that are new to it, here and nowhere else.

    What it finds it keeps, and uses in recordings too.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class CudaRecorder:
    """Records CUDA graphs, which share one private memory pool.

    They may share it because no two of them run at once, and because results are copied out before the next one runs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.max_bytes = int(_MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory)
        self._stream, self._done = torch.cuda.Stream(device), torch.cuda.Event()
        self._memory = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """See `Recorder`. On a side stream, as recording does."""
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream), searching_kernels():
            for _ in range(_WARM_UP_CALLS):
                result = function()
        outer.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Any]) -> Recording:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads go on allocating meanwhile, which only they may not do in a recording of their own.
        options: dict[str, Any] = {"pool": self._memory, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            # The outer context: one that fails to end a recording leaves its stream the current one.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)), torch.cuda.graph(graph, **options):
                before = torch.cuda.memory_reserved(self.device)
                outputs = function()
                nbytes = torch.cuda.memory_reserved(self.device) - before
        except BaseException:
            # The allocator may take the pool for one that is still being recorded into.
            self.forget()
            raise
        return Recording(graph.replay, outputs, nbytes)

    def forget(self) -> None:
        """See `Recorder`."""
        self._memory = torch.cuda.graph_pool_handle()

    @contextmanager
    def exclusive(self):
        """See `Recorder`. Threads may each have a stream of their own."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)
