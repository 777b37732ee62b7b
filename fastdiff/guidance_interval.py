"""Guidance interval, lossy: classifier-free guidance only in the middle of the schedule, half the work outside of it.

Guidance matters least at the first steps, where it pushes pictures to a common look, and at the last, where it hardly
changes them (Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724). Upstream's loop is left alone: it hands
the UNet the doubled batch, of which only the conditional half is computed; returned for both halves it makes the
guidance formula the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .loop import DenoisingLoop, current_loop

# Made once a prompt: its half must stay one and the same tensor, by which caches know it.
_LASTING = ("encoder_hidden_states", "added_cond_kwargs", "controlnet_cond")
# Not batched, whatever the first dimension happens to be.
_UNBATCHED = ("cross_attention_kwargs", "guess_mode", "conditioning_scale", "return_dict")


@dataclass(frozen=True)
class GuidanceInterval:
    """The hooks that halve a model's work in the steps before `start` and from `end` on, fractions of the steps."""

    start: float
    end: float

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Forward pre-hook of a UNet or ControlNet: keep the conditional half of every batched input."""
        loop = self._unguided_loop(kwargs)
        if loop is None:
            return None
        batch = (args[0] if args else kwargs["sample"]).shape[0]
        names = ("sample", "timestep", "encoder_hidden_states", "controlnet_cond")
        args = tuple(_half(value, batch, loop, name) for name, value in zip(names, args, strict=False)) + args[len(names) :]
        kwargs = {name: _half(value, batch, loop, name) for name, value in kwargs.items()}
        return args, kwargs

    def after(self, unet: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook of the UNet: give the conditional prediction to both halves."""
        if self._unguided_loop(kwargs) is None:
            return None
        return type(output)(sample=torch.cat([output[0]] * 2))

    def warmup_steps(self) -> int:
        """The smallest number of steps of which one is inside the interval and one outside, at least 2."""
        for steps in range(2, 1000):
            inside = [self.start <= step / steps < self.end for step in range(steps)]
            if any(inside) and not all(inside):
                return steps
        return 2

    def _unguided_loop(self, kwargs: dict) -> DenoisingLoop | None:
        loop = current_loop()
        if loop is None or self.start <= loop.fraction < self.end or not loop.is_guided:
            return None
        # In guess mode a ControlNet gets the conditional half alone.
        return None if kwargs.get("guess_mode") else loop


def apply_guidance_interval(unet: nn.Module, controlnets: list[nn.Module], interval: tuple[float, float] | None) -> None:
    """Put the interval's hooks on the models of a pipeline in place of any there are; None takes them off."""
    for model in (unet, *controlnets):
        for handle in model.__dict__.pop("_guidance_hooks", ()):
            handle.remove()
        if interval is None:
            continue
        hooks = GuidanceInterval(*interval)
        model._guidance_hooks = [model.register_forward_pre_hook(hooks.before, with_kwargs=True)]
        if model is unet:
            # A ControlNet's residuals stay halved: the UNet takes them so.
            model._guidance_hooks.append(model.register_forward_hook(hooks.after, with_kwargs=True))


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
