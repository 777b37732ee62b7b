"""What a measurement is true for."""

from __future__ import annotations

import hashlib
import os
import platform

import torch

# Variables that take kernels away.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def machine_of(device: torch.device) -> dict[str, str]:
    """The processor, how many threads, and the versions; what is measured under other ones is measured anew."""
    facts = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return {**facts, "processor": f"{name}, {major}.{minor}", "cuda": str(torch.version.cuda)}
    features = sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    limits = {name: os.environ[name] for name in _LIMITS if name in os.environ}
    return {
        **facts,
        "processor": _processor_name(),
        "features": hashlib.sha256(" ".join(features).encode()).hexdigest()[:12],
        "threads": str(torch.get_num_threads()),
        **limits,
    }


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            facts = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in facts.items()}
        return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    except (OSError, KeyError, ValueError):
        return platform.processor() or platform.machine()
