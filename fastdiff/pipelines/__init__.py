"""What users hold: the SDXL family, how it is loaded and checked, and what one call needs.

May import the plan and every room below it.
"""

from .sdxl import (
    FastStableDiffusionXLControlNetImg2ImgPipeline,
    FastStableDiffusionXLControlNetInpaintPipeline,
    FastStableDiffusionXLControlNetPipeline,
    FastStableDiffusionXLImg2ImgPipeline,
    FastStableDiffusionXLInpaintPipeline,
    FastStableDiffusionXLPipeline,
)

__all__ = [
    "FastStableDiffusionXLControlNetImg2ImgPipeline",
    "FastStableDiffusionXLControlNetInpaintPipeline",
    "FastStableDiffusionXLControlNetPipeline",
    "FastStableDiffusionXLImg2ImgPipeline",
    "FastStableDiffusionXLInpaintPipeline",
    "FastStableDiffusionXLPipeline",
]
