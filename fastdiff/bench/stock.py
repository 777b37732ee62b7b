"""Stock pipelines for the ladder, many over one set of weights."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from .. import EMBEDDED_CHECKPOINT
from ..pipelines.checkpoints import check_checkpoint
from .settings import SDXL_RANDOM, Settings


def load_stock(settings: Settings) -> StableDiffusionXLPipeline:
    """Load the stock pipeline whose weights all rungs share, in the settings' dtype, on their device.

    Raises:
        ValueError: the model is no SDXL checkpoint.
    """
    options = {"dtype": settings.dtype, "use_safetensors": True}
    if settings.model == SDXL_RANDOM:
        pipe = _random(settings, options)
    else:
        check_checkpoint(StableDiffusionXLPipeline, settings.model, {})
        pipe = StableDiffusionXLPipeline.from_pretrained(settings.model, **options)
    pipe.to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _random(settings: Settings, options: dict) -> StableDiffusionXLPipeline:
    from .sdxl_random import random_pipeline, random_unet

    embedded = StableDiffusionXLPipeline.from_pretrained(EMBEDDED_CHECKPOINT, **options)
    if settings.measures == ("step",):
        # The other models never run: the tiny ones stand in and save minutes and memory.
        unet = random_unet(settings.dtype, settings.device)
        return StableDiffusionXLPipeline(**{**embedded.components, "unet": unet}, add_watermarker=False)
    return random_pipeline(embedded.tokenizer, settings.dtype, settings.device)


def twin(
    base: StableDiffusionXLPipeline,
    *,
    float32: bool = False,
    channels_last: bool = False,
    sdpa: bool = True,
    own_parameters: bool = False,
) -> StableDiffusionXLPipeline:
    """Make another stock pipeline with models of its own, over those weights of `base` that need no change.

    Args:
        float32: convert all weights.
        channels_last: put the weights of convolutions in NHWC order.
        sdpa: False takes diffusers' attention from before `scaled_dot_product_attention`.
        own_parameters: give UNet and VAE `Parameter` objects of their own, over the same storage.
    """
    unet, vae = _copied(base.unet), _copied(base.vae)
    texts = {name: getattr(base, name) for name in ("text_encoder", "text_encoder_2")}
    if float32:
        texts = {name: _copied(model) for name, model in texts.items()}
    for model in (unet, vae, *(texts.values() if float32 else ())):
        _replace_weights(model, float32, channels_last, own_parameters)
    if not sdpa:
        unet.set_attn_processor(AttnProcessor())
        vae.set_attn_processor(AttnProcessor())
    scheduler = type(base.scheduler).from_config(base.scheduler.config)
    components = {**base.components, **texts, "unet": unet, "vae": vae, "scheduler": scheduler}
    pipe = StableDiffusionXLPipeline(**components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _copied(model: Any) -> Any:
    """New modules over the very parameters and buffers of `model`."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def _replace_weights(model: nn.Module, float32: bool, channels_last: bool, always: bool) -> None:
    """Give modules new parameters where their values change form; `.to()` would change those of `base` as well."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = parameter.detach()
            if float32:
                weight = weight.float()
            if channels_last and weight.ndim == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            if always or weight.data_ptr() != parameter.data_ptr():
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
