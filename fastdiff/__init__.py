"""SDXL at hardware speed, one import away from diffusers."""

from pathlib import Path

EMBEDDED_CHECKPOINT: str = str(Path(__file__).parent / "shapes" / "checkpoint")
"""Path of the tiny SDXL checkpoint that ships with the package."""
