"""Command line options of the benchmarks, the pipelines they time, and what each records beside its times.

    pytest benchmarks                                           # the embedded model, minutes
    pytest benchmarks --model sdxl-random --size 256 --size 512 # full size, random weights, no download
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

sys.path.insert(0, str(Path(__file__).parent))

from fastdiff import EMBEDDED_CHECKPOINT, FastConfig, FastStableDiffusionXLPipeline  # noqa: E402
from fastdiff.bench import machine  # noqa: E402
from fastdiff.bench.settings import MEASURES, SDXL_RANDOM, Settings  # noqa: E402
from fastdiff.bench.stock import load_stock, twin  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdiff")
    group.addoption("--model", default="embedded", help=f"embedded, {SDXL_RANDOM}, a directory or a model id")
    group.addoption("--size", type=int, action="append", help="pixels of an edge, repeatable (64)")
    group.addoption("--batch", type=int, action="append", help="pictures of a call, repeatable (1)")
    group.addoption("--steps", type=int, default=4, help="of a whole picture (4)")
    group.addoption("--device", action="append", help="repeatable (cuda if there is one, or else cpu)")
    group.addoption("--dtype", action="append", choices=("float32", "bfloat16"), help="repeatable (bfloat16)")
    group.addoption("--rounds", type=int, default=6, help="pairs of stock and fast (6)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    defaults = {
        "size": [64],
        "batch": [1],
        "device": ["cuda" if torch.cuda.is_available() else "cpu"],
        "dtype": ["bfloat16"],
    }
    for name, default in defaults.items():
        if name in metafunc.fixturenames:
            scope = "session" if name in ("device", "dtype") else "function"
            metafunc.parametrize(name, metafunc.config.getoption(name) or default, scope=scope)


@pytest.fixture(scope="session")
def model(request) -> str:
    """What `Settings.model` takes."""
    name = request.config.getoption("model")
    return EMBEDDED_CHECKPOINT if name == "embedded" else name


@pytest.fixture(scope="session")
def rounds(request) -> int:
    return request.config.getoption("rounds")


@pytest.fixture(scope="session")
def pipes(model: str, device: str, dtype: str) -> dict[str, StableDiffusionXLPipeline]:
    """The stock pipeline and fastdiff's "exact" one over the same weights, convolutions aside; neither is compiled.

    Compiled code is for the ladder; what stands here shows the rooms one by one, and starts at once.
    """
    settings = Settings(model=model, size=(64, 64), dtype=getattr(torch, dtype), device=device, measures=MEASURES)
    base = load_stock(settings)
    config = FastConfig.preset("exact", compile="off")
    fast = FastStableDiffusionXLPipeline.from_pipe(twin(base, channels_last=True), fast=config)
    fast.set_progress_bar_config(disable=True)
    assert fast.plan, "applies the plan, so that no round has to"
    return {"stock": base, "fast": fast}


@pytest.fixture
def settings(request, model: str, size: int, batch: int, device: str, dtype: str) -> Settings:
    """The settings of one benchmark."""
    return Settings(
        model=model,
        size=(size, size),
        batch=batch,
        steps=request.config.getoption("steps"),
        dtype=getattr(torch, dtype),
        device=device,
    )


def pytest_benchmark_update_machine_info(config, machine_info: dict) -> None:
    """Versions, processor, threads, GPU and power limit, without the host's name."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
    ours = machine.machine_info("cuda" if torch.cuda.is_available() else "cpu")
    # The plugin's own description of the processor says more.
    machine_info.update({name: value for name, value in ours.items() if name not in machine_info})


def pytest_benchmark_update_commit_info(config, commit_info: dict) -> None:
    """Only what identifies the code."""
    for key in list(commit_info):
        if key not in ("id", "dirty", "time"):
            del commit_info[key]
