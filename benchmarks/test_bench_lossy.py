"""The denoising loop of full-size SDXL with each lossy option beside the same pipeline without it.

Run on an otherwise idle machine:

    pytest benchmarks/test_bench_lossy.py --benchmark-json=results.json

What the options cost in prompt adherence is measured on the embedded checkpoint, 200 held-out captions:

    python -m fastdiff.shapes.training.evaluate --json lossy.json --variants stock exact \
        "exact:guidance_interval=(0.1,0.8)" "exact:guidance_interval=(0.0,0.5)" \
        "exact:deep_cache_interval=2" "exact:deep_cache_interval=3" \
        "exact:guidance_interval=(0.1,0.8),deep_cache_interval=2"
"""

from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from interleave import run_interleaved

from fastdiff import FastConfig, FastStableDiffusionXLPipeline
from fastdiff.bench.sdxl_random import random_unet, random_vae

SIZE, STEPS, ROUNDS = 256, 10, 3
OPTIONS = [
    {"guidance_interval": (0.1, 0.8)},
    {"guidance_interval": (0.0, 0.5)},
    {"deep_cache_interval": 2},
    {"deep_cache_interval": 3},
    {"guidance_interval": (0.1, 0.8), "deep_cache_interval": 2},
]


@pytest.fixture(scope="module")
def without() -> FastStableDiffusionXLPipeline:
    """The pipeline without lossy options, eager; the others run over its UNet."""
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return FastStableDiffusionXLPipeline(
        unet=random_unet(),
        vae=random_vae(),
        scheduler=EulerDiscreteScheduler(),
        **dict.fromkeys(names),
        add_watermarker=False,
        fast=FastConfig.preset("exact", compile="off"),
    )


def loop(pipe: FastStableDiffusionXLPipeline):
    """A callable that runs the loop of one picture, with classifier-free guidance, to its latents."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 77, 2048, generator=generator).to(torch.bfloat16).split(1)
    pooled = torch.randn(2, 1280, generator=generator).to(torch.bfloat16).split(1)
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        return pipe(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            pooled_prompt_embeds=pooled[0],
            negative_pooled_prompt_embeds=pooled[1],
            width=SIZE,
            height=SIZE,
            num_inference_steps=STEPS,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images

    return run


def written(options: dict) -> str:
    """Options as the evaluation of the embedded checkpoint writes them."""
    return ",".join(f"{name}={value}" for name, value in options.items()).replace(", ", ",")


@pytest.mark.parametrize("options", OPTIONS, ids=written)
def test_loop(benchmark, without, options):
    benchmark.group = f"{STEPS} steps {SIZE}x{SIZE}, bfloat16, eager"
    benchmark.extra_info["options"] = written(options)
    lossy = FastStableDiffusionXLPipeline.from_pipe(without, fast=FastConfig.preset("exact", compile="off", **options))
    run_interleaved(benchmark, loop(lossy), loop(without), ROUNDS)
