"""No wait for the device in the SDXL loop, nor for `denoising_end` before it, whatever the scheduler."""

import pytest
import torch
from legs import LEG, draw
from recorded import place, places, record

SCHEDULERS = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
]


@pytest.fixture(scope="module")
def plain():
    """A pipeline on the CPU, for reference."""
    return LEG.pipeline()


@pytest.fixture(scope="module")
def pipe():
    pipe = LEG.pipeline()
    place(pipe)
    return pipe


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_wait_in_the_loop(pipe, plain, scheduler):
    for target in (pipe, plain):
        target.scheduler = LEG.scheduler(scheduler, target.scheduler.config)
    recorder, picture = record(pipe)
    assert places(recorder.waits("loop")) == {}
    torch.manual_seed(0)
    expected = draw(plain, generator=None, output_type="np")
    assert abs(picture - expected).max() < 1e-4


def test_denoising_end_needs_no_wait(pipe):
    pipe.scheduler = LEG.scheduler("EulerDiscreteScheduler", pipe.scheduler.config)
    full, _ = record(pipe)
    part, _ = record(pipe, denoising_end=0.5)
    assert places(part.waits("before")) == places(full.waits("before"))
    assert places(part.waits("loop")) == {}


def test_image_to_image_does_not_wait(pipe):
    from diffusers import StableDiffusionXLImg2ImgPipeline

    if LEG.patched:
        img2img = StableDiffusionXLImg2ImgPipeline(**pipe.components)
    else:
        from fastdiff import FastStableDiffusionXLImg2ImgPipeline

        img2img = FastStableDiffusionXLImg2ImgPipeline(**pipe.components, fast="exact")
    img2img.set_progress_bar_config(disable=True)
    img2img.scheduler = LEG.scheduler("DDIMScheduler", pipe.scheduler.config)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    recorder, _ = record(img2img, image=image, strength=0.6, width=None, height=None)
    assert places(recorder.waits("loop")) == {}
