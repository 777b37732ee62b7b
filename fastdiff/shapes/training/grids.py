"""Pictures of results: a grid of drawings under their captions, and a strip that sets variants side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..captions import Scene, caption
from .oracle import Verdict

COLUMNS = 8


def save_grid(path: Path, scenes: list[Scene], pictures: list[np.ndarray], verdicts: list[Verdict]) -> None:
    """Save the pictures under their captions, eight to a row; those the oracle rejects are framed in red."""
    height, width = pictures[0].shape[:2]
    columns, text_height = COLUMNS, 56
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (width + 8), rows * (height + text_height)), "white")
    canvas = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=10)
    for index, (scene, picture, verdict) in enumerate(zip(scenes, pictures, verdicts, strict=True)):
        x, y = index % columns * (width + 8) + 4, index // columns * (height + text_height) + text_height - 4
        canvas.multiline_text((x, y - text_height + 5), _wrap(caption(scene), 26), fill="black", font=font, spacing=1)
        if not verdict.satisfied:
            canvas.rectangle((x - 3, y - 3, x + width + 2, y + height + 2), fill="red")
        grid.paste(Image.fromarray(picture), (x, y))
    grid.save(path, optimize=True)


def save_strip(path: Path, rows: dict[str, list[np.ndarray]], columns: int) -> None:
    """Save one row of pictures for each variant, the same captions and seeds above one another."""
    height, width = next(iter(rows.values()))[0].shape[:2]
    label, gap = 90, 4
    strip = Image.new("RGB", (label + columns * (width + gap), len(rows) * (height + gap)), "white")
    for row, (variant, pictures) in enumerate(rows.items()):
        y = row * (height + gap)
        ImageDraw.Draw(strip).multiline_text((4, y + height // 2 - 8), _wrap(variant, 14), fill="black")
        for column, picture in enumerate(pictures[:columns]):
            strip.paste(Image.fromarray(picture), (label + column * (width + gap), y))
    strip.save(path, optimize=True)


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.replace(":", ": ").replace(",", ", ").split():
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < width else [lines[-1], word]
    return "\n".join(lines)
