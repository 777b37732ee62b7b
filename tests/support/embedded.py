"""Pipelines over the embedded checkpoint, and a short run of one."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionXLPipeline

import fastdiff
from fastdiff import FastConfig, FastStableDiffusionXLPipeline


def load_stock(**kwargs) -> StableDiffusionXLPipeline:
    """A fresh stock pipeline in float32 whose weights nobody shares."""
    pipe = StableDiffusionXLPipeline.from_pretrained(fastdiff.EMBEDDED_CHECKPOINT, dtype=torch.float32, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_fast(fast: FastConfig | str = "exact", **kwargs) -> FastStableDiffusionXLPipeline:
    """A fresh fast pipeline in float32."""
    pipe = FastStableDiffusionXLPipeline.from_pretrained(
        fastdiff.EMBEDDED_CHECKPOINT, dtype=torch.float32, fast=fast, **kwargs
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, seed: int = 0, **kwargs) -> torch.Tensor:
    """Run a pipeline and return its latents (or what `output_type` says)."""
    call = {
        "prompt": "a red circle on a blue background",
        "num_inference_steps": 3,
        "height": 64,
        "width": 64,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    return pipe(**{**call, **kwargs}).images


def storage_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters, each storage counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(storages.values())
