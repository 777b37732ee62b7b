"""Pictures: drawn, written, put side by side, and how close two of them are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MIN_HEIGHT, _LABEL_HEIGHT = 256, 24


def side_by_side(pictures: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Put pictures of one size beside each other, a label under each; small ones are enlarged without smoothing."""
    scale = -(-_MIN_HEIGHT // pictures[0].height)
    width, height = pictures[0].width * scale, pictures[0].height * scale
    strip = Image.new("RGB", (width * len(pictures), height + _LABEL_HEIGHT), "white")
    pen = ImageDraw.Draw(strip)
    font = ImageFont.load_default(13)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        strip.paste(picture.resize((width, height), Image.Resampling.NEAREST), (index * width, 0))
        pen.text((index * width + 6, height + 4), label, fill="black", font=font)
    return strip


def psnr(picture: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB over 8-bit values; infinite for equal pictures."""
    difference = np.asarray(picture, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    error = np.mean(difference**2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def draw(pipe, call: dict, bar: bool = True) -> list:
    """Call a pipeline; `seeds` become generators."""
    import torch

    call = dict(call)
    # Generators on the CPU give the same noise on every device.
    call["generator"] = [torch.Generator("cpu").manual_seed(number) for number in call.pop("seeds")]
    pipe.set_progress_bar_config(disable=not bar)
    return pipe(**call).images


def save(images, output: Path) -> list[Path]:
    """Write pictures, whole or not at all; several get numbers. Returns where they are."""
    paths = [output] if len(images) == 1 else [
        output.with_stem(f"{output.stem}-{number}") for number in range(1, len(images) + 1)
    ]
    for image, path in zip(images, paths, strict=True):
        partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        image.save(partial)
        partial.replace(path)
    return paths
