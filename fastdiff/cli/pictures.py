"""Pictures to look at: comparison strips, and how close two pictures are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MIN_HEIGHT, _LABEL_HEIGHT = 256, 24


def side_by_side(pictures: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Put pictures of one size beside each other, a label under each; small ones are enlarged without smoothing."""
    scale = -(-_MIN_HEIGHT // pictures[0].height)
    width, height = pictures[0].width * scale, pictures[0].height * scale
    strip = Image.new("RGB", (width * len(pictures), height + _LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(13)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        strip.paste(picture.resize((width, height), Image.Resampling.NEAREST), (index * width, 0))
        draw.text((index * width + 6, height + 4), label, fill="black", font=font)
    return strip


def psnr(picture: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB over 8-bit values; infinite for equal pictures."""
    difference = np.asarray(picture, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    error = np.mean(difference**2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
