"""A pipeline over a UNet that the compiler traces in a second: random weights, two levels, 12 transformer blocks."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

import fastdiff

from .embedded import load_stock


def tiny_unet() -> UNet2DConditionModel:
    """A stock UNet for the embedded checkpoint's text encoders; the same weights each time."""
    config = UNet2DConditionModel.load_config(fastdiff.EMBEDDED_CHECKPOINT, subfolder="unet")
    changes = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 3),
        "attention_head_dim": (2, 4),
        "norm_num_groups": 8,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config({**config, **changes}).eval()


def load_tiny() -> StableDiffusionXLPipeline:
    """A fresh stock pipeline in float32."""
    return load_stock(unet=tiny_unet())


def save_tiny(folder: Path) -> Path:
    """Write the pipeline; returns the folder."""
    load_tiny().save_pretrained(folder)
    return folder
