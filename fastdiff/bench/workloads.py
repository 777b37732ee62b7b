"""What is timed: a UNet step, a VAE decode, a whole picture. Each takes the same inputs on every rung."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.unet import FastUNet2DConditionModel
from .settings import Settings

PROMPT = "a red circle on a blue background"
_TIMESTEP = 500.0


def workload(name: str, pipe: StableDiffusionXLPipeline, settings: Settings, steps: int | None = None) -> Callable:
    """A callable that does one `step`, `vae` or `picture` and returns its result.

    Called again, a step is one of the loop's later ones: the same prompt, another call of the UNet.

    Args:
        steps: denoising steps of a picture, in place of those of the settings.
    """
    if name == "step":
        return _step(pipe, settings)
    if name == "vae":
        return _vae(pipe, settings)
    return _picture(pipe, settings, steps or settings.steps)


def as_array(result: torch.Tensor | list) -> np.ndarray:
    """A workload's result as float32, to compare rungs."""
    if isinstance(result, torch.Tensor):
        return result.float().cpu().numpy()
    return np.stack([np.asarray(picture, dtype=np.float32) for picture in result])


def step_inputs(unet: Any, settings: Settings) -> dict:
    """Arguments of one call of the UNet. Samples: (batch, 4, height / 8, width / 8), with guidance twice as many."""
    generator = torch.Generator().manual_seed(0)
    batch = (2 if settings.guidance > 1 else 1) * settings.batch
    width, height = settings.size
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def normal(*shape: int) -> torch.Tensor:
        # Rounded to the settings' dtype, so that a rung in float32 sees the same numbers.
        return torch.randn(*shape, generator=generator).to(settings.dtype).to(settings.device, unet.dtype)

    sizes = torch.tensor([[height, width, 0, 0, height, width]] * batch)
    timestep = torch.tensor(_TIMESTEP)
    return {
        "sample": normal(batch, config.in_channels, height // 8, width // 8),
        # Fast schedulers keep timesteps on the host, stock ones on the device.
        "timestep": timestep if isinstance(unet, FastUNet2DConditionModel) else timestep.to(settings.device),
        "encoder_hidden_states": normal(batch, 77, config.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": normal(batch, pooled),
            "time_ids": sizes.to(settings.device, unet.dtype),
        },
    }


def step_flops(unet: nn.Module, settings: Settings) -> int:
    """Floating-point operations of one step of the stock UNet, two for each multiply-add; nothing is computed."""
    with torch.device("meta"):
        stock = UNet2DConditionModel.from_config(unet.config).to(settings.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        inputs = step_inputs(stock, settings)
        inputs["added_cond_kwargs"] = {name: x.to("meta") for name, x in inputs["added_cond_kwargs"].items()}
        tensors = {name: x.to("meta") for name, x in inputs.items() if isinstance(x, torch.Tensor)}
        stock(**{**inputs, **tensors})
    return counter.get_total_flops()


def _step(pipe: StableDiffusionXLPipeline, settings: Settings) -> Callable[[], torch.Tensor]:
    unet = pipe.unet
    inputs = step_inputs(unet, settings)
    if isinstance(unet, FastUNet2DConditionModel):
        # By the device that tensors name: rows of "cuda" are not found for "cuda:0".
        unet.prepare_timesteps(inputs["timestep"][None], inputs["sample"].device, unet.dtype)

    def step() -> torch.Tensor:
        with torch.no_grad():
            return unet(**inputs, return_dict=False)[0]

    return step


def _vae(pipe: StableDiffusionXLPipeline, settings: Settings) -> Callable[[], torch.Tensor]:
    width, height = settings.size
    shape = (settings.batch, pipe.vae.config.latent_channels, height // 8, width // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    latents = latents.to(settings.dtype).to(settings.device, pipe.vae.dtype)

    def decode() -> torch.Tensor:
        with torch.no_grad():
            return pipe.vae.decode(latents, return_dict=False)[0]

    return decode


def _picture(pipe: StableDiffusionXLPipeline, settings: Settings, steps: int) -> Callable[[], list]:
    width, height = settings.size

    def picture() -> list:
        return pipe(
            [PROMPT] * settings.batch,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=settings.guidance,
            generator=torch.Generator().manual_seed(0),
        ).images

    return picture
