"""What the layers of a model are given at the size it is made for, found without computing."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from torch import nn

# Tokens of a prompt; samples with and without guidance.
_TOKENS, _BATCH = 77, 2
_DEFAULT_SIDE = 128
_DEPTHS = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")
_KINDS = (UNet2DConditionModel, ControlNetModel, AutoencoderKL)

Shapes = dict[str, tuple[int, ...]]


def input_shapes(model: nn.Module, side: int | None = None) -> Shapes:
    """The shape of what each linear layer, convolution and GEGLU of a model takes, by the layer's stock name.

    Args:
        model: an SDXL UNet, ControlNet or VAE, stock or fast.
        side: of the latents; the model's own by default.

    Returns:
        Of each row of transformer blocks the first. Empty for a model that asks for inputs of another kind, such as an
        IP-Adapter's.
    """
    stock: Any = next((kind for kind in _KINDS if isinstance(model, kind)), None)
    if stock is None:
        return {}
    # One transformer block is given what all in its row are.
    config: Any = model.config
    shallow = {name: 1 for name in _DEPTHS if config.get(name) is not None}
    with torch.device("meta"):
        twin = stock.from_config({**config, **shallow}).to(torch.bfloat16)
    found: Shapes = {}
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | GEGLU):
            module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: tuple(args[0].shape)}))
    try:
        with torch.no_grad(), torch.device("meta"):
            _run(twin, side)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError):
        pass
    return found


def _run(model: Any, side: int | None) -> None:
    if isinstance(model, AutoencoderKL):
        scale = 2 ** (len(model.config.block_out_channels) - 1)
        side = side or model.config.sample_size // scale
        model.decode(_empty(1, model.config.latent_channels, side, side))
        model.encode(_empty(1, model.config.in_channels, side * scale, side * scale))
        return
    config = model.config
    side = side or getattr(config, "sample_size", None) or _DEFAULT_SIDE
    arguments: dict[str, Any] = {
        "sample": _empty(_BATCH, config.in_channels, side, side),
        "timestep": torch.empty(_BATCH),
        "encoder_hidden_states": _empty(_BATCH, _TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {"text_embeds": _empty(_BATCH, pooled), "time_ids": _empty(_BATCH, 6)}
    if isinstance(model, ControlNetModel):
        arguments["controlnet_cond"] = _empty(_BATCH, config.conditioning_channels, 8 * side, 8 * side)
    model(**arguments)


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")
