"""The names that a benchmark is asked for by, known before any library is imported."""

from __future__ import annotations

SDXL_RANDOM = "sdxl-random"
"""In place of a checkpoint: SDXL of full size with random weights, no download."""

MEASURES = ("step", "vae", "picture")
"""`"step"`: one call of the UNet with classifier-free guidance, not the first of its prompt. `"vae"`: one decode.
`"picture"`: a whole pipeline call, from prompt to PIL pictures."""

RUNGS = (
    "float32",
    "bfloat16",
    "sdpa",
    "channels-last",
    "recipe",
    "exact",
    "balanced",
    "max",
    "compile-repeated-blocks",
    "compile-regions",
    "openvino",
    "zentorch",
)
"""Of the ladder, in its order."""


def check_rungs(names: list[str]) -> None:
    """Raise `ValueError` for a name that is on no rung."""
    for name in names:
        if name not in RUNGS:
            raise ValueError(f"unknown rung {name!r}; choose from {', '.join(RUNGS)}")
