"""Draw a scene: flat anti-aliased shapes on a flat background."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ..captions import SHAPES, Scene, Thing

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 60),
    "green": (50, 160, 70),
    "blue": (45, 90, 210),
    "purple": (140, 60, 170),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (135, 135, 135),
    "pink": (250, 175, 195),
}
CANVAS = 128
"""Width and height of a drawing, pixels; every length below is in these pixels."""
RADII = {"small": (20.0, 23.0), "large": (32.0, 38.0), None: (20.0, 38.0)}
PAIR_RADII = (20.0, 24.0)
_SUPERSAMPLE = 4
_JITTER = 6


@dataclass(frozen=True)
class Placement:
    """Where one thing lies: centre and radius in pixels, and its colour as drawn."""

    thing: Thing
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]


def outline(shape: str) -> list[tuple[float, float]]:
    """The shape's polygon around the origin, inside the unit circle, y downwards."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0.0, -0.95), (0.98, 0.75), (-0.98, 0.75)]
    if shape == "star":
        tips = [(1.0 if k % 2 == 0 else 0.5, math.pi * k / 5) for k in range(10)]
        return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in tips]
    angles = [2 * math.pi * k / 64 for k in range(64)]
    if shape == "circle":
        return [(0.92 * math.cos(a), 0.92 * math.sin(a)) for a in angles]
    if shape == "heart":
        x = [math.sin(a) ** 3 for a in angles]
        y = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
        return [(0.95 * u, -0.95 * (v + 2.5) / 16) for u, v in zip(x, y, strict=True)]
    raise ValueError(f"shape must be one of circle, square, triangle, star, heart, not {shape!r}")


def place(scene: Scene, rng: random.Random) -> list[Placement]:
    """Choose centre, radius and exact colour of every thing as the scene allows."""
    if scene.relation is None:
        return [_place_one(scene.things[0], rng)]
    offset = {"left": (-31, 0), "right": (31, 0), "above": (0, -31), "below": (0, 31)}[scene.relation]
    # The pair moves sideways as one, and each thing a little on its own; the gap stays at least 6 pixels.
    drift = rng.uniform(-10, 10)
    placements = []
    for sign, thing in zip((1, -1), scene.things, strict=True):
        radius = rng.uniform(*PAIR_RADII)
        x, y = (CANVAS / 2 + sign * step + rng.uniform(-4, 4) for step in offset)
        x, y = (x, y + drift) if offset[0] else (x + drift, y)
        placements.append(Placement(thing, x, y, radius, _jitter(thing.colour, rng)))
    return placements


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw the scene as a 128x128 RGB picture; the same state of `rng` gives the same picture."""
    picture = Image.new("RGB", (CANVAS, CANVAS), _jitter(scene.background, rng))
    for placement in place(scene, rng):
        mask = shape_mask(placement.thing.shape, placement.x, placement.y, placement.radius)
        picture.paste(placement.rgb, (0, 0), mask)
    return picture


def collage(rng: random.Random, size: int) -> Image.Image:
    """Draw four overlapping things of any colour anywhere: `size` pixels a side, no caption."""
    picture = Image.new("RGB", (size, size), _jitter(rng.choice(tuple(PALETTE)), rng))
    for _ in range(4):
        shape, colour = rng.choice(SHAPES), rng.choice(tuple(PALETTE))
        x, y = rng.uniform(0, size), rng.uniform(0, size)
        mask = shape_mask(shape, x, y, rng.uniform(8, RADII["large"][1]), size)
        picture.paste(_jitter(colour, rng), (0, 0), mask)
    return picture


def shape_mask(shape: str, x: float, y: float, radius: float, size: int = CANVAS) -> Image.Image:
    """The anti-aliased coverage of one shape, as an 8-bit grey picture of `size` pixels a side."""
    scale = _SUPERSAMPLE
    mask = Image.new("L", (size * scale, size * scale))
    points = [((x + radius * u) * scale, (y + radius * v) * scale) for u, v in outline(shape)]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask.reduce(scale)


def _place_one(thing: Thing, rng: random.Random) -> Placement:
    radius = rng.uniform(*RADII[thing.size])
    low, high, middle = radius + 4, CANVAS - radius - 4, CANVAS / 2
    x, y = middle + rng.uniform(-4, 4), middle + rng.uniform(-4, 4)
    if thing.position is None:
        x, y = rng.uniform(low, high), rng.uniform(low, high)
    elif thing.position == "left":
        x = rng.uniform(low, max(low, 44))
    elif thing.position == "right":
        x = rng.uniform(min(high, CANVAS - 44), high)
    elif thing.position == "top":
        y = rng.uniform(low, max(low, 44))
    elif thing.position == "bottom":
        y = rng.uniform(min(high, CANVAS - 44), high)
    return Placement(thing, x, y, radius, _jitter(thing.colour, rng))


def _jitter(colour: str, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, c + rng.randint(-_JITTER, _JITTER))) for c in PALETTE[colour])
    return red, green, blue
