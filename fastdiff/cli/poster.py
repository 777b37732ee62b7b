"""The picture of `fastdiff demo`: rows of pictures, and bars for the times."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..bench.machine import describe
from ..bench.table import seconds, shows_nothing, title

_CELL, _GAP, _MARGIN, _BAR = 176, 12, 40, 34
_INK, _FAINT, _PAPER = "#1c2330", "#68707f", "#ffffff"
_COLOURS = {"stock": "#a9b1bd", "fastdiff": "#2f7de1"}
_NAMES = {"stock": "stock diffusers", "fastdiff": "fastdiff"}


def poster(prompts: Sequence[str], stock: list, fast: list, closeness: float, results: dict | None) -> Image.Image:
    """Put the demo into one picture.

    Args:
        stock, fast: a picture for each prompt.
        closeness: the least PSNR of two pictures that belong together, in dB.
        results: of the ladder, with the spreads `stock`, `fast` and `ratio` for the bars; None leaves them out.
    """
    width = 2 * _MARGIN + len(prompts) * (_CELL + _GAP) - _GAP
    bars = 0 if results is None else 150 + 2 * (_BAR + 14)
    sheet = Image.new("RGB", (width, 2 * (_CELL + 40) + 190 + bars), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 28), "fastdiff: the same pictures, sooner", fill=_INK, font=_font(30))
    y = _rows(sheet, pen, 84, prompts, {"stock": stock, "fastdiff": fast}, closeness)
    if results is not None:
        y = _bars(pen, y + 22, width, results)
    return sheet.crop((0, 0, width, y + 20))


def _rows(sheet, pen, y: int, prompts: Sequence[str], rows: dict[str, list], closeness: float) -> int:
    for who, pictures in rows.items():
        note = "" if who == "stock" else f": the same prompts and seeds, PSNR {closeness:.0f} dB or more"
        pen.text((_MARGIN, y), f"{_NAMES[who]}{note}", fill=_COLOURS[who] if who != "stock" else _FAINT, font=_font(16))
        y += 26
        for index, picture in enumerate(pictures):
            cell = picture.resize((_CELL, _CELL), Image.Resampling.LANCZOS)
            sheet.paste(cell, (_MARGIN + index * (_CELL + _GAP), y))
        y += _CELL + 14
    for index, prompt in enumerate(prompts):
        text = "\n".join(textwrap.wrap(prompt, 27))
        pen.text((_MARGIN + index * (_CELL + _GAP), y - 6), text, fill=_FAINT, font=_font(12))
    return y + 50


def _bars(pen, y: int, width: int, results: dict) -> int:
    pen.text((_MARGIN, y), title(results).replace("sdxl-random", "SDXL at full size"), fill=_INK, font=_font(20))
    y += 40
    rows = {"stock": results["stock"], "fastdiff": results["fast"]}
    longest = max(times["median"] for times in rows.values())
    left, span = _MARGIN + 180, width - 2 * _MARGIN - 180 - 260
    for who, times in rows.items():
        pen.text((_MARGIN, y + 8), _NAMES[who], fill=_INK, font=_font(16))
        length = max(2, round(span * times["median"] / longest))
        pen.rounded_rectangle((left, y, left + length, y + _BAR), 5, fill=_COLOURS[who])
        beside = "no difference shown" if shows_nothing(results["ratio"]) else (
            f"{results['ratio']['median']:.2f} times as fast"
        )
        text = seconds(times["median"]) + ("" if who == "stock" else f"   {beside}")
        pen.text((left + length + 10, y + 8), text, fill=_INK, font=_font(16))
        y += _BAR + 14
    pen.text((_MARGIN, y + 6), f"{describe(results['machine'])}; timed in turn, medians", fill=_FAINT, font=_font(13))
    return y + 30


def _font(size: int):
    return ImageFont.load_default(size)
