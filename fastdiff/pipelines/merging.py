"""Merging adapters into the weights, and taking them out again to the bit."""

from __future__ import annotations

from typing import Any

from ..models import FastUNet2DConditionModel
from ..weights import remember_plain, restore_plain

# To a type checker the pipeline that the mixin is part of.
_Pipeline: Any = object


class MergingMixin(_Pipeline):
    """`fuse_lora` and `unfuse_lora` of a fast pipeline."""

    def fuse_lora(self, *args, **kwargs) -> None:
        """As upstream."""
        if isinstance(self.unet, FastUNet2DConditionModel):
            remember_plain(self.unet)
        super().fuse_lora(*args, **kwargs)

    def unfuse_lora(self, *args, **kwargs) -> None:
        """As upstream; the UNet's weights are then what they were, to the bit."""
        super().unfuse_lora(*args, **kwargs)
        if isinstance(self.unet, FastUNet2DConditionModel):
            restore_plain(self.unet)
