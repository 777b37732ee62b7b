"""One process from its start to its first picture: `python benchmarks/cold_start.py MODEL WHO STARTED [PATH]`.

WHO is `stock`, `fast` (compiles, and saves the compiled code to PATH) or `compiled` (loads it from PATH). STARTED is
`time.time()` of just before the process was started. Prints the seconds of each stage as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

model, who, started, *path = sys.argv[1:]
stages, reached = {}, float(started)


def stage(name: str) -> None:
    """Note how long what has just been done took."""
    global reached
    now = time.time()
    stages[name], reached = round(now - reached, 3), now


import torch  # noqa: E402
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from fastdiff import EMBEDDED_CHECKPOINT, FastConfig, FastStableDiffusionXLPipeline  # noqa: E402
from fastdiff.bench.sdxl_random import UNET_CONFIG, VAE_CONFIG  # noqa: E402

CONFIG = FastConfig.preset("exact", compile="regional")


@torch.no_grad()
def quickly_filled(cls: type, config: dict) -> torch.nn.Module:
    """A model of full size in bfloat16 with the same small numbers over and over, in seconds."""
    with torch.device("meta"):
        made = cls(**config)
    made = made.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    numbers = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for parameter in made.parameters():
        scale = 1.0 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        flat = parameter.view(-1)
        for start in range(0, flat.numel(), numbers.numel()):
            part = flat[start : start + numbers.numel()]
            part.copy_(numbers[: part.numel()]).mul_(scale)
    return made


def embedded():
    if who == "stock":
        pipe = StableDiffusionXLPipeline.from_pretrained(EMBEDDED_CHECKPOINT, use_safetensors=True, dtype=torch.float32)
    else:
        pipe = FastStableDiffusionXLPipeline.from_pretrained(
            EMBEDDED_CHECKPOINT, dtype=torch.float32, fast=CONFIG, compiled=path[0] if who == "compiled" else None
        )
    call = {"prompt": "a red circle", "num_inference_steps": 4, "height": 64, "width": 64}
    return pipe, call


def sdxl_random():
    from diffusers import AutoencoderKL

    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    parts = {
        "unet": quickly_filled(UNet2DConditionModel, UNET_CONFIG),
        "vae": quickly_filled(AutoencoderKL, VAE_CONFIG),
        "scheduler": EulerDiscreteScheduler(),
    }
    pipe = StableDiffusionXLPipeline(**parts, **dict.fromkeys(names), add_watermarker=False)
    if who != "stock":
        file = path[0] if who == "compiled" else None
        pipe = FastStableDiffusionXLPipeline.from_pipe(pipe, fast=CONFIG, compiled=file)
    generator = torch.Generator().manual_seed(0)
    embeds = {f"{sign}prompt_embeds": torch.randn(1, 77, 2048, generator=generator) for sign in ("", "negative_")}
    pooled = {f"{sign}pooled_prompt_embeds": torch.randn(1, 1280, generator=generator) for sign in ("", "negative_")}
    call = {name: tensor.to(torch.bfloat16) for name, tensor in {**embeds, **pooled}.items()}
    return pipe, {**call, "num_inference_steps": 1, "height": 256, "width": 256, "output_type": "latent"}


stage("import")
pipe, call = embedded() if model == "embedded" else sdxl_random()
pipe.set_progress_bar_config(disable=True)
stage("load")
if who == "compiled":
    # Applies the plan, and with it gives torch the compiled code.
    assert pipe.plan and pipe._artifacts.installed
    stage("compiled code")
if who == "fast":
    options = {name: value for name, value in call.items() if name not in ("height", "width")}
    options = {"prompt": None, **options} if model != "embedded" else options
    pipe.warmup(sizes=[(call["width"], call["height"])], **options)
else:
    pipe(**call, generator=torch.Generator().manual_seed(0))
stage("first picture")
stages["total"] = round(sum(stages.values()), 3)
if who == "fast":
    pipe.save_compiled(path[0])
print(json.dumps(stages))
