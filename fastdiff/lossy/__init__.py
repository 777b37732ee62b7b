"""Opt-in, as they change pictures: the guidance interval and the deep cache; and where the loop is, which both ask.

May import no other room.
"""

from .deep_cache import apply_deep_cache, remove_deep_cache
from .guidance_interval import apply_guidance_interval, warmup_steps
from .loop import DenoisingLoop, current_loop

__all__ = [
    "DenoisingLoop",
    "apply_deep_cache",
    "apply_guidance_interval",
    "current_loop",
    "remove_deep_cache",
    "warmup_steps",
]
