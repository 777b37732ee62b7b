"""What a picture may be asked for with, wherever it is asked for: on the command line, in a row, in a request."""

from __future__ import annotations

from pathlib import Path

MAX_PROMPT = 2000  # characters; the text encoders read 77 tokens, a few hundred characters
MAX_SEED = 2**53 - 1  # the largest whole number that JSON readers everywhere keep exactly
MAX_STEPS = 1000  # what the noise schedule has
MAX_GUIDANCE = 50
MIN_SIDE = 64  # pixels; below, the UNet has nothing left to halve
SIDE_STEP = 8  # pixels that one latent pixel stands for


def split_lora(text: str) -> tuple[str, float]:
    """Split `"FILE:WEIGHT"`, or `"FILE"`, whose weight is 1."""
    file, found, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if found and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0
