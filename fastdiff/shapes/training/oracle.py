"""Does a picture show what its caption says? Image analysis only, no learned model.

Needs scikit-image, which comes with the `test` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image

from ..captions import BACKGROUNDS, COLOURS, SHAPES, Scene, parse
from .render import PALETTE, outline

_MIN_CONTRAST = 16.0
"""Distance in CIELAB from the background at which a pixel belongs to a thing."""
_MAX_COLOUR_ERROR = 25.0
"""Distance in CIELAB from the nearest palette colour beyond which a colour has no name."""
_MIN_OVERLAP = 0.75
"""Intersection over union with the ideal outline below which a shape has no name."""
_BLUNTNESS = 0.08
"""Radius of the corners that still count as the shape's, as a share of its extent."""
_MIN_AREA = 1 / 300
"""Share of the picture below which a region is a speck, not a thing."""
_CENTRAL = 0.1
"""Offset from the middle, as a share of the side, up to which a thing lies in the center."""
_LARGE = 0.38
"""Height as a share of the picture's from which a thing is large; small ones stay under `_SMALL`."""
_SMALL = 0.37


@dataclass(frozen=True)
class Seen:
    """One region of the picture; a name is None where nothing fits. Lengths are shares of the sides."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Verdict:
    """Which attributes of the caption hold. Those the caption leaves open hold."""

    shape: bool
    colour: bool
    background: bool
    position: bool
    size: bool

    @property
    def satisfied(self) -> bool:
        """Shape and colour and background hold: the measure of the model card."""
        return self.shape and self.colour and self.background


def judge(caption: str | Scene, picture: Image.Image | np.ndarray) -> Verdict:
    """Compare a picture with its caption.

    Args:
        caption: a caption of the grammar, or the scene it stands for.
        picture: an RGB picture, PIL or uint8 of shape (height, width, 3), any size from 64 pixels.

    Returns:
        what holds. With a different number of things than the caption's, shape, colour, position and size fail.

    Raises:
        ImportError: scikit-image is not installed.
        ValueError: the caption is outside the grammar.
    """
    scene = parse(caption) if isinstance(caption, str) else caption
    if scene is None:
        raise ValueError(f"caption {caption!r} is outside the grammar of fastdiff.shapes.captions; reword it")
    background, seen = look(picture)
    if len(seen) != len(scene.things):
        return Verdict(False, False, background == scene.background, False, False)
    verdicts = [_compare(scene, background, order) for order in permutations(seen)]
    return max(verdicts, key=lambda v: (v.shape + v.colour, v.position, v.size))


def look(picture: Image.Image | np.ndarray) -> tuple[str | None, list[Seen]]:
    """Name the background and every thing in the picture, largest first."""
    color, measure, morphology = _skimage()
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    lab = color.rgb2lab(pixels)
    height, width = lab.shape[:2]
    frame = np.ones((height, width), dtype=bool)
    frame[3:-3, 3:-3] = False
    ground = np.median(lab[frame], axis=0)
    contrast = np.linalg.norm(lab - ground, axis=-1)
    regions = measure.regionprops(measure.label(contrast > _MIN_CONTRAST))
    seen = []
    for region in sorted(regions, key=lambda region: -region.area):
        if region.area < _MIN_AREA * height * width:
            continue
        top, left, bottom, right = region.bbox
        inner = morphology.erosion(np.pad(region.image, 1), morphology.disk(2))[1:-1, 1:-1]
        inner = inner if inner.any() else region.image
        colour = np.median(lab[top:bottom, left:right][inner], axis=0)
        # Cut the blurred edge at half the contrast of this very region, whatever its colour.
        mask = region.image & (contrast[top:bottom, left:right] > np.linalg.norm(colour - ground) / 2)
        seen.append(
            Seen(
                shape=_name_shape(mask),
                colour=_name_colour(colour, COLOURS),
                x=(left + right) / 2 / width,
                y=(top + bottom) / 2 / height,
                extent=max((bottom - top) / height, (right - left) / width),
            )
        )
    return _name_colour(ground, BACKGROUNDS), seen


def _compare(scene: Scene, background: str | None, seen: Sequence[Seen]) -> Verdict:
    pairs = list(zip(scene.things, seen, strict=True))
    position = all(thing.position is None or thing.position == _name_position(spot) for thing, spot in pairs)
    if scene.relation is not None:
        position = _relation(*seen) == scene.relation
    return Verdict(
        shape=all(thing.shape == spot.shape for thing, spot in pairs),
        colour=all(thing.colour == spot.colour for thing, spot in pairs),
        background=background == scene.background,
        position=position,
        size=all(thing.size is None or thing.size == _name_size(spot) for thing, spot in pairs),
    )


def _name_shape(mask: np.ndarray) -> str | None:
    """The shape whose outline, stretched to the mask's bounding box, overlaps it best."""
    mask = _cropped(mask)
    if not mask.size:
        return None
    overlaps = {
        shape: max(_overlap(mask, _stretched(ideal, *mask.shape)) for ideal in _ideals(shape)) for shape in SHAPES
    }
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= _MIN_OVERLAP else None


@cache
def _ideals(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """The shape's mask, cropped, with sharp and with blunt corners: a latent pixel is as wide as a star's tip."""
    from skimage.draw import polygon2mask

    _, _, morphology = _skimage()
    side = 128
    points = (np.array(outline(shape))[:, ::-1] + 1) / 2 * (side - 1)
    sharp = polygon2mask((side, side), points)
    blunt = morphology.opening(sharp, morphology.disk(round(_BLUNTNESS * side)))
    return _cropped(sharp), _cropped(blunt)


def _cropped(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if rows.size else mask[:0]


def _stretched(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = (np.arange(height) + 0.5) * mask.shape[0] / height
    columns = (np.arange(width) + 0.5) * mask.shape[1] / width
    return mask[rows.astype(int)[:, None], columns.astype(int)]


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def _name_colour(lab: np.ndarray, names: Sequence[str]) -> str | None:
    color, _, _ = _skimage()
    palette = color.rgb2lab(np.array([PALETTE[name] for name in names], dtype=np.uint8)[None])[0]
    distances = np.linalg.norm(palette - lab, axis=-1)
    return names[int(distances.argmin())] if distances.min() <= _MAX_COLOUR_ERROR else None


def _name_position(spot: Seen) -> str:
    dx, dy = spot.x - 0.5, spot.y - 0.5
    if max(abs(dx), abs(dy)) <= _CENTRAL:
        return "center"
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def _name_size(spot: Seen) -> str | None:
    if spot.extent >= _LARGE:
        return "large"
    return "small" if spot.extent <= _SMALL else None


def _relation(first: Seen, second: Seen) -> str:
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _skimage():  # noqa: ANN202 - three modules of an optional dependency
    try:
        from skimage import color, measure, morphology
    except ImportError as missing:
        raise ImportError("the oracle needs scikit-image, of the extra `test`") from missing
    return color, measure, morphology
