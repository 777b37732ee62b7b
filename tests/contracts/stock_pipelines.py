"""Every SDXL pipeline class of upstream, tiny, and what it is called with.

`FASTDIFF_PATCHED_TREE=TREE PYTHONPATH=TREE/src python stock_pipelines.py` counts the waits of each, before the loop and
in it, with eight schedulers, as the table of `patches/README.md` has them.
"""

from __future__ import annotations

import inspect

import diffusers
import torch
from legs import CHECKPOINT
from recorded import SyncRecorder, place

SCHEDULERS = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "HeunDiscreteScheduler",
    "DDIMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
CLASSES = [
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    "StableDiffusionXLAdapterPipeline",
    "AnimateDiffSDXLPipeline",
]
IMAGE = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
MASK = (IMAGE[:, 1:2] > 0.5).float()


def base() -> diffusers.StableDiffusionXLPipeline:
    """The embedded checkpoint in float32."""
    return diffusers.StableDiffusionXLPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)


def tiny_unet(model_class: type, **options) -> torch.nn.Module:
    """A UNet, or what begins as one, with the shape of the embedded checkpoint's and random weights."""
    config = diffusers.UNet2DConditionModel.load_config(CHECKPOINT / "unet")
    known = inspect.signature(model_class.__init__).parameters
    torch.manual_seed(0)
    return model_class(**{k: v for k, v in {**config, **options}.items() if k in known and v is not None}).eval()


def controlnet(union: bool = False) -> torch.nn.Module:
    """A ControlNet for the embedded checkpoint whose output is not 0, as it is before training."""
    config = diffusers.UNet2DConditionModel.load_config(CHECKPOINT / "unet")
    options = {"conditioning_embedding_out_channels": (4, 4, 8, 8)}
    if union:
        options |= {"num_trans_channel": config["block_out_channels"][0], "num_trans_head": 1}
        options["num_proj_channel"] = options["num_trans_channel"]
    net = tiny_unet(diffusers.ControlNetUnionModel if union else diffusers.ControlNetModel, **options)
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return net


def stock_pipeline(name: str) -> diffusers.DiffusionPipeline:
    """A tiny pipeline of the class."""
    components = base().components
    if "ControlNet" in name:
        components["controlnet"] = controlnet(union="Union" in name)
    if "Adapter" in name:
        config = components["unet"].config
        torch.manual_seed(0)
        components["adapter"] = diffusers.T2IAdapter(
            channels=config.block_out_channels,
            num_res_blocks=config.layers_per_block,
            downscale_factor=16,
            adapter_type="full_adapter_xl",
        )
    if "Pix2Pix" in name:
        components["unet"] = tiny_unet(diffusers.UNet2DConditionModel, in_channels=8)
    if "AnimateDiff" in name:
        adapter = diffusers.MotionAdapter(
            block_out_channels=components["unet"].config.block_out_channels,
            motion_layers_per_block=1,
            motion_num_attention_heads=1,
            motion_norm_num_groups=4,
            use_motion_mid_block=False,
        )
        components |= {"motion_adapter": adapter}
    pipeline_class = getattr(diffusers, name)
    known = inspect.signature(pipeline_class.__init__).parameters
    pipe = pipeline_class(**{key: value for key, value in components.items() if key in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_options(pipe: diffusers.DiffusionPipeline, **options) -> dict:
    """What to call a pipeline of one of the classes with, beyond what it defaults to."""
    name = type(pipe).__name__
    call = {"prompt": "a red circle", "num_inference_steps": 4, "height": 64, "width": 64, "output_type": "np"}
    if "ControlNet" in name:
        control = "control_image" if any(part in name for part in ("Img2Img", "Inpaint", "Union")) else "image"
        call[control] = [IMAGE] if "Union" in name else IMAGE
    if "Union" in name:
        call["control_mode"] = [0]
    if any(part in name for part in ("Img2Img", "Inpaint", "Pix2Pix", "Adapter")):
        call["image"] = IMAGE
    if "Inpaint" in name:
        call["mask_image"] = MASK
    if "Img2Img" in name or "Inpaint" in name:
        call["strength"] = 0.75
    if "AnimateDiff" in name:
        call["num_frames"] = 2
    known = inspect.signature(pipe.__call__).parameters
    return {key: value for key, value in {**call, **options}.items() if key in known}


def waits(pipe: diffusers.DiffusionPipeline, **options) -> dict[str, list[str]]:
    """Places of the waits before the loop and in it, when a pipeline runs as if on a GPU."""
    torch.manual_seed(0)
    with SyncRecorder() as recorder, recorder.watch(pipe):
        pipe(**call_options(pipe, **options))
    return {phase: [e.where.rpartition("/")[2] for e in recorder.waits(phase)] for phase in ("before", "loop")}


def main() -> None:
    """Print a row for each class: waits before the loop and in its four steps, with each scheduler."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    for name in CLASSES:
        pipe = stock_pipeline(name)
        place(pipe)
        cells = []
        for scheduler in SCHEDULERS:
            pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, clip_sample=False)
            counted = waits(pipe)
            cells.append(f"{len(counted['before'])} + {len(counted['loop'])}")
        print("|", name, "|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
