"""Guidance interval, lossy: classifier-free guidance only in the middle of the schedule, half the work outside of it.

Guidance matters least at the first steps, where it pushes pictures to a common look, and at the last, where it hardly
changes them (Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724). Upstream's loop is left alone: it hands
the UNet the doubled batch, of which only the conditional half is computed; returned for both halves it makes the
guidance formula the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .loop import DenoisingLoop, current_loop

# Made once a prompt: its half must stay one and the same tensor, by which caches know it.
_LASTING = ("encoder_hidden_states", "added_cond_kwargs", "controlnet_cond")
# Not batched, whatever the first dimension happens to be.
_UNBATCHED = ("cross_attention_kwargs", "guess_mode", "conditioning_scale", "return_dict")
# What upstream's pipelines pass by position.
_POSITIONAL = ("sample", "timestep", "encoder_hidden_states")


def apply_guidance_interval(unet: nn.Module, controlnets: list[nn.Module]) -> None:
    """Have the models do half the work in the unguided steps of pipelines that ask for it.

    The models may be shared with pipelines that do not: which steps are unguided is read from the running call.
    """
    model: Any
    for model in (unet, *controlnets):
        if "_guidance_hooks" in model.__dict__:
            continue
        model._guidance_hooks = [model.register_forward_pre_hook(_keep_conditional_half, with_kwargs=True)]
        if model is unet:
            # A ControlNet's residuals stay halved: the UNet takes them so.
            model._guidance_hooks.append(model.register_forward_hook(_give_to_both_halves, with_kwargs=True))


def warmup_steps(interval: tuple[float, float]) -> int:
    """The smallest number of steps of which one is inside the interval and one outside, at least 2."""
    for steps in range(2, 1000):
        inside = [interval[0] <= step / steps < interval[1] for step in range(steps)]
        if any(inside) and not all(inside):
            return steps
    return 2


def _unguided_loop(kwargs: dict) -> DenoisingLoop | None:
    loop = current_loop()
    if loop is None or (interval := loop.config.guidance_interval) is None:
        return None
    if interval[0] <= loop.fraction < interval[1] or not loop.is_guided:
        return None
    # In guess mode a ControlNet gets the conditional half alone.
    return None if kwargs.get("guess_mode") else loop


def _keep_conditional_half(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a UNet or ControlNet."""
    loop = _unguided_loop(kwargs)
    if loop is None:
        return None
    batch = (args[0] if args else kwargs["sample"]).shape[0]
    args = tuple(_half(value, batch, loop, name) for name, value in zip(_POSITIONAL, args, strict=False))
    return args, {name: _half(value, batch, loop, name) for name, value in kwargs.items()}


def _give_to_both_halves(unet: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook of the UNet."""
    if _unguided_loop(kwargs) is None:
        return None
    return type(output)(sample=torch.cat([output[0]] * 2))


def _half(value: Any, batch: int, loop: DenoisingLoop, name: str) -> Any:
    if name in _UNBATCHED:
        return value
    if isinstance(value, dict):
        return {key: _half(inner, batch, loop, name) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_half(inner, batch, loop, name) for inner in value)
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] != batch:
        return value
    if name not in _LASTING:
        return value[batch // 2 :]
    # The whole is kept with its half, so that its id is not given to another tensor.
    whole, half = loop.memory.setdefault(("half", id(value)), (value, value[batch // 2 :]))
    return half
