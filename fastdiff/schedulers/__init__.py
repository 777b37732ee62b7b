"""Schedulers that never make the host wait for the device: one fast class per stock class of diffusers, in `twins.py`.

May import no other room.
"""

from .host import FAST_CLASSES
from .linear import StepWeights, guided_step
from .twins import fast_scheduler, stock_scheduler

__all__ = ["FAST_CLASSES", "StepWeights", "fast_scheduler", "guided_step", "stock_scheduler"]
