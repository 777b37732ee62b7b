"""How much of a model's arithmetic is done inside of the regions that get compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.compiler.compilation import repeated_blocks


def region_share(model: nn.Module, call: Callable[[], object]) -> float:
    """Count the FLOPs of a call, and return the part that is done in the model's repeated blocks, from 0.0 to 1.0.

    Args:
        model: a UNet, ControlNet or VAE that is not compiled: compiled code is not counted. Weights and inputs may be
            on the meta device.
        call: runs the model, or the part of it that counts.
    """
    inside, entered = 0, 0
    counter = FlopCounterMode(display=False)

    def enter(*_) -> None:
        nonlocal entered
        entered = counter.get_total_flops()

    def leave(*_) -> None:
        nonlocal inside
        inside += counter.get_total_flops() - entered

    handles = []
    for block in repeated_blocks(model):
        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        with counter, torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return inside / counter.get_total_flops()
