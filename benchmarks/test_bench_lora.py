"""A LoRA that is not merged: what it costs a step, stock beside fast, and how long a swap takes.

At full size, on an otherwise idle machine:

    pytest benchmarks/test_bench_lora.py --model sdxl-random --size 256 --size 512 --benchmark-json=results.json
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastdiff import FastConfig, FastStableDiffusionXLPipeline
from fastdiff.bench.settings import MEASURES, Settings
from fastdiff.bench.stock import load_stock, twin
from fastdiff.bench.timing import timed
from fastdiff.bench.workloads import as_array, workload
from fastdiff.models.form import Form

RANK = 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


@pytest.fixture(scope="session")
def loras(model, device, dtype, pipes_with_adapters, tmp_path_factory) -> list[Path]:
    """Two adapters of one rank, on attention and feed-forward, in files."""
    unet = pipes_with_adapters["stock"].unet
    shapes = {
        name: layer.weight.shape
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".transformer_blocks." in name and name.endswith(TARGETS)
    }
    files = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, (rows, columns) in shapes.items():
            down = torch.randn(RANK, columns, generator=generator) / columns**0.5
            up = 0.1 * torch.randn(rows, RANK, generator=generator) / RANK**0.5
            tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"] = down, up
        files.append(tmp_path_factory.mktemp("loras") / f"{seed}.safetensors")
        save_file({name: tensor.to(unet.dtype) for name, tensor in tensors.items()}, files[-1])
    return files


@pytest.fixture(scope="session")
def pipes_with_adapters(model, device, dtype) -> dict:
    """The stock pipeline, and one with what the default takes where no stock pipeline shares its weights."""
    settings = Settings(model=model, size=(64, 64), dtype=getattr(torch, dtype), device=device, measures=MEASURES)
    base = load_stock(settings)
    quantization = "int8-dynamic" if device == "cpu" else "auto"
    config = FastConfig.preset("balanced", quantization=quantization, pack_weights=True)
    fast = FastStableDiffusionXLPipeline.from_pipe(twin(base, channels_last=True), fast=config)
    fast.set_progress_bar_config(disable=True)
    assert fast.plan
    return {"stock": base, "fast": fast}


def test_step(benchmark, pipes_with_adapters, loras, settings, size, device, dtype, rounds):
    benchmark.group = f"UNet step {size}x{size} with a LoRA of rank {RANK}, not merged, {dtype}"
    stock, fast = pipes_with_adapters["stock"], pipes_with_adapters["fast"]
    step = {name: workload("step", pipe, settings) for name, pipe in pipes_with_adapters.items()}
    if "one" not in getattr(stock.unet, "peft_config", {}):
        for pipe in (stock, fast):
            pipe.load_lora_weights(loras[0], adapter_name="one")
    assert fast.plan
    expected, found = (as_array(step[name]()) for name in ("stock", "fast"))
    others: dict[str, list[float]] = {"stock": [], "without": []}

    def run_others() -> None:
        fast.disable_lora()
        step["fast"]()  # keys and values of the prompt
        others["without"].append(timed(step["fast"], device)[0])
        fast.enable_lora()
        others["stock"].append(timed(step["stock"], device)[0])
        step["fast"]()

    benchmark.pedantic(lambda: timed(step["fast"], device), setup=run_others, rounds=rounds, warmup_rounds=1)
    own = list(benchmark.stats.stats.data)
    ratios = {
        name: [other / mine for other, mine in zip(seconds[-rounds:], own, strict=True)]
        for name, seconds in others.items()
    }
    benchmark.extra_info.update(
        relative_error=float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
        stock_median_s=round(statistics.median(others["stock"]), 4),
        without_adapter_median_s=round(statistics.median(others["without"]), 4),
        stock_ratio=[round(f(ratios["stock"]), 3) for f in (statistics.median, min, max)],
        cost_of_adapter=[round(f([1 / r for r in ratios["without"]]), 3) for f in (statistics.median, min, max)],
    )


def test_swap(benchmark, pipes_with_adapters, loras, settings, size, device):
    """A -> B -> A between pictures, by hotswap, the plan looked at again included."""
    benchmark.group = "swap of a LoRA, there and back"
    fast = pipes_with_adapters["fast"]
    if "one" not in getattr(fast.unet, "peft_config", {}):
        fast.load_lora_weights(loras[0], adapter_name="one")
    assert fast.plan
    held = {id(t) for m in fast.unet.modules() if isinstance(m, Form) for t in m.held()}

    def swap() -> None:
        for file in (loras[1], loras[0]):
            fast.load_lora_weights(file, adapter_name="one", hotswap=True)
            assert fast.plan

    benchmark.pedantic(swap, rounds=3, warmup_rounds=1)
    started = time.perf_counter()
    fast.load_lora_weights(loras[1], adapter_name="two")
    assert fast.plan
    added = time.perf_counter() - started
    fast.delete_adapters("two")
    assert fast.plan
    after = {id(t) for m in fast.unet.modules() if isinstance(m, Form) for t in m.held()}
    assert after == held, "nothing is quantized or packed anew"
    benchmark.extra_info["add_another_s"] = round(added, 3)
