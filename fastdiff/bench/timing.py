"""Times, their spread, and memory."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

_STATUS, _CLEAR, _MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
_RESET_PEAK = "5"


def timed(function: Callable[[], T], device: str | torch.device = "cpu") -> tuple[float, T]:
    """Seconds that a call takes until the device has finished, and its result."""
    started = time.perf_counter()
    result = function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def spread(values: list[float], digits: int = 5) -> dict:
    """Median, least, greatest and the values themselves."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "all": [round(value, digits) for value in values],
    }


def free_memory(device: str | torch.device) -> int | None:
    """Bytes that could still be taken; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _field(_MEMINFO, "MemAvailable")


class Memory:
    """How much memory is in use: what tensors hold on CUDA, what the process holds on CPU (Linux only)."""

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)

    def current(self) -> int | None:
        """Bytes in use now; None where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _status("VmRSS")

    def reset_peak(self) -> None:
        """Let `peak` count from now on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif os.access(_CLEAR, os.W_OK):
            _CLEAR.write_text(_RESET_PEAK)

    def peak(self) -> int | None:
        """The most bytes in use at once since `reset_peak`; None where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM")


def _status(field: str) -> int | None:
    return _field(_STATUS, field)


def _field(file: Path, field: str) -> int | None:
    if not file.exists():
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
