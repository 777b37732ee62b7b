"""SDXL at hardware speed, one import away from diffusers."""

import sys
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

EMBEDDED_CHECKPOINT: str = str(Path(__file__).parent / "shapes" / "checkpoint")
"""Path of the tiny SDXL checkpoint that ships with the package."""

# Importing diffusers and torchao takes seconds; names are resolved when first used, so that `fastdiff --help` and
# a mistyped command answer at once.
_HOMES = {
    "FastAutoencoderKL": "models.vae",
    "FastConfig": "config",
    "FastControlNetModel": "models.controlnet",
    "FastDDIMScheduler": "schedulers.twins",
    "FastDPMSolverMultistepScheduler": "schedulers.twins",
    "FastEulerAncestralDiscreteScheduler": "schedulers.twins",
    "FastEulerDiscreteScheduler": "schedulers.twins",
    "FastHeunDiscreteScheduler": "schedulers.twins",
    "FastLCMScheduler": "schedulers.twins",
    "FastStableDiffusionXLControlNetImg2ImgPipeline": "pipelines",
    "FastStableDiffusionXLControlNetInpaintPipeline": "pipelines",
    "FastStableDiffusionXLControlNetPipeline": "pipelines",
    "FastStableDiffusionXLImg2ImgPipeline": "pipelines",
    "FastStableDiffusionXLInpaintPipeline": "pipelines",
    "FastStableDiffusionXLPipeline": "pipelines",
    "FastTCDScheduler": "schedulers.twins",
    "FastUNet2DConditionModel": "models.unet",
    "FastUniPCMultistepScheduler": "schedulers.twins",
    "FusedQKVAttnProcessor": "models.processor",
    "NonFiniteError": "models.finite",
    "OptimizationWarning": "failures",
    "PlanStep": "steps",
    "fast_scheduler": "schedulers",
}

_LIGHT = ("FastConfig",)

__all__ = ["EMBEDDED_CHECKPOINT", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    home = f"{__name__}.{_HOMES[name]}"
    if home not in sys.modules and name not in _LIGHT:
        from .quiet import quiet_imports

        with quiet_imports():
            import_module(home)
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
