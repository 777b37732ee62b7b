"""SDXL at hardware speed, one import away from diffusers."""

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
    "FastDDIMScheduler": "schedulers",
    "FastDPMSolverMultistepScheduler": "schedulers",
    "FastEulerAncestralDiscreteScheduler": "schedulers",
    "FastEulerDiscreteScheduler": "schedulers",
    "FastHeunDiscreteScheduler": "schedulers",
    "FastLCMScheduler": "schedulers",
    "FastStableDiffusionXLControlNetImg2ImgPipeline": "pipelines",
    "FastStableDiffusionXLControlNetInpaintPipeline": "pipelines",
    "FastStableDiffusionXLControlNetPipeline": "pipelines",
    "FastStableDiffusionXLImg2ImgPipeline": "pipelines",
    "FastStableDiffusionXLInpaintPipeline": "pipelines",
    "FastStableDiffusionXLPipeline": "pipelines",
    "FastTCDScheduler": "schedulers",
    "FastUNet2DConditionModel": "models.unet",
    "FastUniPCMultistepScheduler": "schedulers",
    "FusedQKVAttnProcessor": "models.processor",
    "NonFiniteError": "models.finite",
    "OptimizationWarning": "failures",
    "PlanStep": "steps",
    "fast_scheduler": "schedulers",
}

__all__ = ["EMBEDDED_CHECKPOINT", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
