"""Draws with stock pipelines and writes the pictures, as raw bytes: `python stock_pictures.py OUT`."""

import sys

import diffusers
import torch
from legs import CHECKPOINT
from stock_pipelines import stock_pipeline

SCHEDULERS = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]


def main(output: str) -> None:
    """Draw with each scheduler, from an image, over a mask, with a ControlNet, in bfloat16; write all to `output`."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    text_to_image = diffusers.StableDiffusionXLPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    image_to_image = diffusers.StableDiffusionXLImg2ImgPipeline(**text_to_image.components)
    inpaint = diffusers.StableDiffusionXLInpaintPipeline(**text_to_image.components)
    calls = []
    for name in SCHEDULERS:
        scheduler = getattr(diffusers, name).from_config(text_to_image.scheduler.config, clip_sample=False)
        calls.append((text_to_image, scheduler, {"height": 64, "width": 64}))
    calls.append((text_to_image, calls[0][1], {"height": 64, "width": 64, "denoising_end": 0.5}))
    image = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    mask = (image[:, 1:2] > 0.5).float()
    for _, scheduler, _ in calls[:2]:
        calls.append((image_to_image, scheduler, {"image": image, "strength": 0.6}))
    calls.append((inpaint, calls[4][1], {"image": image, "mask_image": mask, "height": 64, "width": 64}))
    guided = stock_pipeline("StableDiffusionXLControlNetPipeline")
    for window in ({}, {"control_guidance_start": 0.3, "control_guidance_end": 0.7}):
        calls.append((guided, calls[4][1], {"image": image, "height": 64, "width": 64, **window}))
    half = diffusers.StableDiffusionXLPipeline.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    for _, scheduler, _ in calls[3:5]:
        calls.append((half, scheduler, {"height": 64, "width": 64}))

    with open(output, "wb") as file:
        for pipe, scheduler, options in calls:
            pipe.set_progress_bar_config(disable=True)
            pipe.scheduler = scheduler
            generator = torch.Generator().manual_seed(0)
            call = {
                "prompt": "a red circle",
                "num_inference_steps": 4,
                "output_type": "np",
                "generator": generator,
            }
            file.write(pipe(**call, **options).images.tobytes())


if __name__ == "__main__":
    main(sys.argv[1])
