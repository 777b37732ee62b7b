"""Schedulers that never make the host wait for the device: one fast class per stock class of diffusers.

May import no other room.
"""

from .linear import StepWeights, guided_step
from .twins import (
    FastDDIMScheduler,
    FastDPMSolverMultistepScheduler,
    FastEulerAncestralDiscreteScheduler,
    FastEulerDiscreteScheduler,
    FastHeunDiscreteScheduler,
    FastLCMScheduler,
    FastTCDScheduler,
    FastUniPCMultistepScheduler,
    fast_scheduler,
    stock_scheduler,
)

__all__ = [
    "FastDDIMScheduler",
    "FastDPMSolverMultistepScheduler",
    "FastEulerAncestralDiscreteScheduler",
    "FastEulerDiscreteScheduler",
    "FastHeunDiscreteScheduler",
    "FastLCMScheduler",
    "FastTCDScheduler",
    "FastUniPCMultistepScheduler",
    "StepWeights",
    "fast_scheduler",
    "guided_step",
    "stock_scheduler",
]
