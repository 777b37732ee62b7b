"""A pytest plugin: upstream's own tests with the fast classes in place of the stock ones.

In a clone of diffusers at the release that is installed, with its test requirements (parameterized, requests-mock):

    PYTHONPATH=<this repository>:<this repository>/tests python -m pytest -p support.upstream_classes \
        tests/pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py ...

Without `-p` the same command runs the stock classes, for comparison. Nothing of upstream's tests is kept here.
"""

from __future__ import annotations

import diffusers

import fastdiff
from fastdiff import FastConfig

_NAMES = (
    "AutoencoderKL",
    "ControlNetModel",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
    "TCDScheduler",
    "UNet2DConditionModel",
    "UniPCMultistepScheduler",
)


def pytest_configure() -> None:
    """Before anything is collected, and so before tests import their classes."""
    resolve = FastConfig.resolve
    # Upstream compares with what it computes in float32; "exact" is what claims to be equal.
    FastConfig.resolve = lambda fast: resolve("exact" if fast is None else fast)
    for name in _NAMES:
        fast = getattr(fastdiff, f"Fast{name}", None)
        if fast is None:
            from fastdiff import models

            fast = getattr(models, f"Fast{name}")
        setattr(diffusers, name, fast)
