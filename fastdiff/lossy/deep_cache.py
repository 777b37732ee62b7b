"""Deep-feature reuse, lossy: the UNet's inner blocks run in every n-th step only.

What the inner levels compute changes little from one step to the next (DeepCache, Ma et al. 2023,
https://arxiv.org/abs/2312.00858). In the steps between, the outermost level alone runs, on the new latents, and takes
what the levels inside of it returned last. In SDXL that level has no attention at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from .loop import current_loop

_NAME = "fastdiff_deep_cache"


@dataclass
class DeepFeatures:
    """What the inner blocks of one UNet returned in the last full step of one call."""

    age: int = 0
    shape: torch.Size | None = None
    reuse: bool = False
    outputs: dict[nn.Module, Any] = field(default_factory=dict)

    def advance(self, shape: torch.Size, interval: int) -> None:
        """Decide for the step that begins whether it reuses; `shape` is that of its latents."""
        self.age += 1
        self.reuse = self.shape == shape and self.age < interval
        if not self.reuse:
            self.age, self.shape = 0, shape
            self.outputs.clear()


class InnerBlock(ModelHook):
    """Runs an inner block, or hands out again what it returned.

    Args:
        key: under which the loop keeps the features of the block's UNet.
        is_last: whether the block's result is what the outermost level takes. Of the others only the number of
            results counts, so nothing is kept of them.
    """

    def __init__(self, key: tuple, is_last: bool):
        super().__init__()
        self._key, self._is_last = key, is_last

    def new_forward(self, module: nn.Module, *args, **kwargs):
        loop = current_loop()
        features = loop.memory.get(self._key) if loop is not None else None
        if features is not None and features.reuse:
            return features.outputs[module]
        output = self.fn_ref.original_forward(*args, **kwargs)
        if features is not None:
            features.outputs[module] = output if self._is_last else _placeholder(output)
        return output


def apply_deep_cache(unet: Any) -> int:
    """Have the inner blocks of a UNet rest in the steps between, in calls of pipelines that ask for it.

    The UNet may be shared with pipelines that do not. To be called after compiling, which replaces the `forward` that
    the hooks wrap.

    Returns:
        The number of inner blocks.
    """
    remove_deep_cache(unet)
    key = ("deep features", id(unet))
    unet._deep_cache_hook = unet.register_forward_pre_hook(partial(_advance, key), with_kwargs=True)
    blocks = _inner_blocks(unet)
    for block in blocks:
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(InnerBlock(key, is_last=block is blocks[-1]), _NAME)
    return len(blocks)


def remove_deep_cache(unet: nn.Module) -> bool:
    """Take off what `apply_deep_cache` put on; returns whether there was anything."""
    if "_deep_cache_hook" not in unet.__dict__:
        return False
    unet.__dict__.pop("_deep_cache_hook").remove()
    for block in _inner_blocks(unet):
        HookRegistry.check_if_exists_or_initialize(block).remove_hook(_NAME, recurse=False)
    return True


def _advance(key: tuple, unet: nn.Module, args: tuple, kwargs: dict) -> None:
    loop = current_loop()
    if loop is not None and loop.config.deep_cache_interval is not None:
        sample = args[0] if args else kwargs["sample"]
        loop.memory.setdefault(key, DeepFeatures()).advance(sample.shape, loop.config.deep_cache_interval)


def _inner_blocks(unet: Any) -> list[nn.Module]:
    """All blocks but those of the outermost level, in the order they run."""
    return [*unet.down_blocks[1:], *([unet.mid_block] if unet.mid_block is not None else []), *unet.up_blocks[:-1]]


def _placeholder(output: torch.Tensor | tuple) -> torch.Tensor | tuple:
    # A zero without dimensions, because a ControlNet's residual may be added to it.
    if isinstance(output, torch.Tensor):
        return output.new_zeros(())
    return type(output)(_placeholder(inner) for inner in output)
