"""The SDXL family as fast drop-ins: each class is a stock pipeline with the fast mixin before it."""

from __future__ import annotations

from diffusers import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from ..identity import stands_in_for
from .mixin import FastPipelineMixin


@stands_in_for(StableDiffusionXLPipeline)
class FastStableDiffusionXLPipeline(FastPipelineMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` at hardware speed: the same arguments, outputs and checkpoints.

    Args:
        fast: a `FastConfig`, the name of a preset (`"exact"`, `"balanced"`, `"max"`, `"off"`) or None for
            `"balanced"`. All other arguments are those of the stock class.
    """


@stands_in_for(StableDiffusionXLImg2ImgPipeline)
class FastStableDiffusionXLImg2ImgPipeline(FastPipelineMixin, StableDiffusionXLImg2ImgPipeline):
    """`StableDiffusionXLImg2ImgPipeline` at hardware speed, the SDXL refiner included; see the text-to-image class."""


@stands_in_for(StableDiffusionXLInpaintPipeline)
class FastStableDiffusionXLInpaintPipeline(FastPipelineMixin, StableDiffusionXLInpaintPipeline):
    """`StableDiffusionXLInpaintPipeline` at hardware speed; see the text-to-image class."""


@stands_in_for(StableDiffusionXLControlNetPipeline)
class FastStableDiffusionXLControlNetPipeline(FastPipelineMixin, StableDiffusionXLControlNetPipeline):
    """`StableDiffusionXLControlNetPipeline` at hardware speed, ControlNets included; see the text-to-image class."""


@stands_in_for(StableDiffusionXLControlNetImg2ImgPipeline)
class FastStableDiffusionXLControlNetImg2ImgPipeline(FastPipelineMixin, StableDiffusionXLControlNetImg2ImgPipeline):
    """`StableDiffusionXLControlNetImg2ImgPipeline` at hardware speed; see the text-to-image class."""


@stands_in_for(StableDiffusionXLControlNetInpaintPipeline)
class FastStableDiffusionXLControlNetInpaintPipeline(FastPipelineMixin, StableDiffusionXLControlNetInpaintPipeline):
    """`StableDiffusionXLControlNetInpaintPipeline` at hardware speed; see the text-to-image class."""
