"""Seconds that compiling one classifier-free-guidance step of the UNet takes: regions beside the whole graph.

At full size, on an otherwise idle machine; caches of earlier compilations are not used, and what the first graph of a
process pays is not counted:

    pytest benchmarks/test_bench_compile.py --model sdxl-random --size 256 --benchmark-json=results.json
"""

from __future__ import annotations

import statistics

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.utils import counters

from fastdiff import FastConfig, FastStableDiffusionXLPipeline
from fastdiff.bench.flops import region_share
from fastdiff.bench.settings import Settings
from fastdiff.bench.stock import load_stock
from fastdiff.bench.timing import timed
from fastdiff.bench.workloads import workload
from fastdiff.compiler.compilation import apply_compilation, region_kinds, repeated_blocks, undo_compilation
from fastdiff.models.unet import FastUNet2DConditionModel


@pytest.fixture(scope="module")
def plain_pipe(model: str, device: str, dtype: str) -> FastStableDiffusionXLPipeline:
    """A fast pipeline that is not compiled, with weights as the compiler takes them."""
    settings = Settings(model=model, size=(64, 64), dtype=getattr(torch, dtype), device=device, measures=("step",))
    config = FastConfig.preset("exact", compile="off", pack_weights=False, cuda_graphs=False)
    pipe = FastStableDiffusionXLPipeline.from_pipe(load_stock(settings), fast=config)
    assert pipe.plan, "applies the plan"
    return pipe


@pytest.fixture(scope="module", autouse=True)
def toolchain(device: str) -> None:
    """What only the first graph of a process pays for, whatever it is: the compiler's own start, and its headers."""
    layers = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3), torch.nn.GroupNorm(4, 32), torch.nn.SiLU()).to(device)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(layers)(torch.zeros(2, 32, 8, 8, device=device))


@pytest.fixture(scope="session")
def first_call_seconds() -> dict[tuple, list[float]]:
    """What the benchmarks of this run have measured, by settings and mode."""
    return {}


@pytest.mark.parametrize("mode", ["regional", "full"])
def test_compile_unet(benchmark, plain_pipe, settings, size, batch, device, dtype, mode, first_call_seconds):
    benchmark.group = f"compile the UNet {size}x{size}, batch {2 * batch}, {dtype}"
    unet = plain_pipe.unet
    step = workload("step", plain_pipe, settings)
    step()
    eager_s = statistics.median(timed(step, device)[0] for _ in range(3))

    def compile_anew() -> None:
        torch.compiler.reset()
        counters.clear()
        apply_compilation(unet, mode)

    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            benchmark.pedantic(lambda: timed(step, device), setup=compile_anew, rounds=1)
        graphs = counters["stats"]["unique_graphs"]
        compiled_s = statistics.median(timed(step, device)[0] for _ in range(3))
    finally:
        undo_compilation(unet)
        torch.compiler.reset()
    # Running the step is no part of compiling it.
    seconds = benchmark.stats.stats.median - compiled_s
    key = (size, batch, device, dtype)
    first_call_seconds[key, mode] = seconds
    benchmark.extra_info.update(
        compile_s=round(seconds, 2),
        graphs=graphs,
        kinds=region_kinds(unet),
        regions=len(repeated_blocks(unet)) if mode == "regional" else 1,
        flop_share=round(_flop_share(unet, size, batch), 4) if mode == "regional" else 1.0,
        step_eager_s=round(eager_s, 4),
        step_compiled_s=round(compiled_s, 4),
    )
    if mode == "full" and (key, "regional") in first_call_seconds:
        benchmark.extra_info["regional_to_full"] = round(first_call_seconds[key, "regional"] / seconds, 3)
    assert not counters["graph_break"]


def _flop_share(unet: FastUNet2DConditionModel, size: int, batch: int) -> float:
    """The part of a step's FLOPs inside of the regions, counted on the meta device."""
    config, edge = unet.config, size // 8
    with torch.device("meta"):
        twin = FastUNet2DConditionModel.from_stock(UNet2DConditionModel.from_config(config))
        twin.context_cache.enabled = False
        time_ids = 6 * config.addition_time_embed_dim
        text_embeds = torch.empty(2 * batch, config.projection_class_embeddings_input_dim - time_ids)
        added = {"text_embeds": text_embeds, "time_ids": torch.empty(2 * batch, 6)}
        latents = torch.empty(2 * batch, config.in_channels, edge, edge)
        context = torch.empty(2 * batch, 77, config.cross_attention_dim)
        return region_share(twin, lambda: twin(latents, torch.empty(2 * batch), context, added_cond_kwargs=added))
