"""What a run of the ladder measures: two runs with equal settings on equal machines can be compared."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from .names import MEASURES, SDXL_RANDOM

__all__ = ["MEASURES", "RECIPE", "REFERENCE", "SDXL_RANDOM", "Settings"]

REFERENCE = "sdpa"
"""The rung that all ratios refer to: stock diffusers as it is by default, in the settings' dtype."""

RECIPE = "recipe"
"""The rung that follows diffusers' guide to the end; ratios to it are taken as well."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One benchmark.

    Attributes:
        model: checkpoint directory, model id, or `SDXL_RANDOM`.
        size: (width, height) in pixels.
        steps: denoising steps of a picture.
        batch: pictures of a call; with guidance the UNet sees twice as many samples.
        guidance: scale; up to 1 is without, as for distilled models.
        measures: some of `MEASURES`; the first one is what table and plot show.
        dtype: of all rungs but the float32 ones.
        device: torch device.
        rounds: how often each rung is timed.
        seconds: stop a rung's rounds after about this long, though not before the second.
    """

    model: str
    size: tuple[int, int]
    steps: int = 20
    batch: int = 1
    guidance: float = 5.0
    measures: tuple[str, ...] = ("picture",)
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    rounds: int = 7
    seconds: float = 60.0

    def as_json(self, name: str | None = None) -> dict:
        """The settings as JSON holds them; `name` stands for the model, so that no local path gets published."""
        fields = dataclasses.asdict(self)
        fields.update(
            model=name or self.model,
            size=list(self.size),
            measures=list(self.measures),
            dtype=str(self.dtype).removeprefix("torch."),
        )
        return fields
