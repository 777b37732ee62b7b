"""The machine that numbers belong to. Names hardware and versions, never the host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..weights.activations import load_kernels

_PACKAGES = ("fastdiff", "torch", "diffusers", "transformers", "torchao", "peft", "accelerate", "openvino")
_CPUINFO = Path("/proc/cpuinfo")


def machine_info(device: str | torch.device = "cpu") -> dict:
    """Processor, threads, GPU with its power limit, and versions of what is installed."""
    info: dict[str, Any] = {
        "system": platform.system(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpp_compiler": load_kernels() is not None,
        "versions": _versions(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info.update(
            gpu=properties.name,
            gpu_memory_gib=round(properties.total_memory / 2**30, 1),
            cuda=torch.version.cuda,
            power_limit_w=_power_limit(),
        )
    return info


def describe(info: dict) -> str:
    """One line: hardware and the versions that matter most."""
    threads = f"{info['threads']} thread{'' if info['threads'] == 1 else 's'}"
    if not info.get("cpp_compiler", True):
        threads += ", no C++ compiler"
    hardware = info["gpu"] if "gpu" in info else f"{info['cpu']}, {threads}"
    names = ("torch", "diffusers", "torchao")
    return f"{hardware}; " + ", ".join(f"{name} {info['versions'][name]}" for name in names)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE) if _CPUINFO.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _power_limit() -> float | None:
    """Watts, where the driver's tool says so."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=power.limit", "--format=csv,noheader,nounits", f"--id={torch.cuda.current_device()}"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return float(answer) if re.fullmatch(r"[\d.]+", answer) else None
