"""What every benchmark records beside its times."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

_PACKAGES = ("torch", "diffusers", "transformers", "torchao", "peft")


def pytest_benchmark_update_machine_info(config, machine_info: dict) -> None:
    """Versions, processor and threads, without the host's name."""
    machine_info.pop("node", None)
    machine_info["versions"] = {name: importlib.metadata.version(name) for name in _PACKAGES}
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpus"] = os.cpu_count()
    machine_info["amx_bf16"] = torch.cpu._is_amx_tile_supported()
    machine_info["system"] = platform.system()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()


def pytest_benchmark_update_commit_info(config, commit_info: dict) -> None:
    """Only what identifies the code."""
    for key in list(commit_info):
        if key not in ("id", "dirty", "time"):
            del commit_info[key]
