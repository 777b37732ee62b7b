"""`fastdiff generate`: draw pictures of a prompt, also beside stock diffusers."""

from __future__ import annotations

import argparse
import secrets
import time
from functools import partial

from .. import EMBEDDED_CHECKPOINT
from ..errors import UsageError
from ..limits import MAX_SEED
from .arguments import (
    add_model_arguments,
    fast_config,
    guidance,
    input_file,
    output_path,
    positive_int,
    seed,
    size,
    steps,
)
from .loading import check_model_arguments, load_pipeline, usable_device
from .pictures import draw, save

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def add_command(commands) -> None:
    """Register the command with the subparsers of the `fastdiff` command."""
    generate = commands.add_parser("generate", help="draw a picture from a prompt")
    generate.add_argument("prompt")
    picture_path = partial(output_path, suffixes=_IMAGE_SUFFIXES)
    generate.add_argument("-o", "--output", default="out.png", type=picture_path, help="picture to write (out.png)")
    generate.add_argument("--negative-prompt")
    generate.add_argument("--steps", type=steps, default=20, help="denoising steps (20)")
    generate.add_argument("--guidance", type=guidance, default=5.0, help="guidance scale (5.0)")
    generate.add_argument("--size", type=size, metavar="WxH", help="in pixels; the model's own size by default")
    generate.add_argument("--seed", type=seed, help="of the first picture, one more for each other (random, printed)")
    generate.add_argument("--batch", type=positive_int, default=1, help="pictures of this prompt (1)")
    generate.add_argument("--compare", action="store_true", help="also run stock diffusers; both side by side")
    generate.add_argument("--compiled", metavar="FILE", type=input_file, help="code that `fastdiff warmup` saved")
    add_model_arguments(generate)
    generate.set_defaults(check=_check, run=_generate)


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.prompt.strip():
        raise UsageError("the prompt is empty: say what to draw")
    check_model_arguments(arguments)


def _generate(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    if arguments.size is not None:
        _check_memory(arguments)
    if arguments.model == EMBEDDED_CHECKPOINT:
        from ..shapes.captions import vocabulary_hint

        hint = vocabulary_hint(arguments.prompt)
        if hint:
            print(hint)
    pipe = load_pipeline(arguments)
    call = _call_arguments(arguments)
    if arguments.compare:
        from .compare import compare

        return compare(arguments, pipe, call)
    before = time.perf_counter()
    images = draw(pipe, call)
    seconds = time.perf_counter() - before
    for path, number in zip(save(images, arguments.output), call["seeds"], strict=True):
        print(f"wrote {path} (seed {number})")
    print(f"{len(images)} picture(s) in {seconds:.2f} s, {time.perf_counter() - started:.2f} s with loading")
    return 0


def _check_memory(arguments: argparse.Namespace) -> None:
    import torch
    from diffusers import AutoencoderKL

    from ..pipelines.checkpoints import loading_dtype
    from ..pipelines.memory import check_memory

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else loading_dtype(fast_config(arguments))
    vae = AutoencoderKL.load_config(arguments.model, subfolder="vae", local_files_only=not arguments.online)
    try:
        check_memory(vae, arguments.size, arguments.batch, dtype, usable_device(arguments.device))
    except ValueError as error:
        raise UsageError(f"--size: {error}") from error


def _call_arguments(arguments: argparse.Namespace) -> dict:
    first = arguments.seed if arguments.seed is not None else secrets.randbelow(2**31)
    call = {
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "num_images_per_prompt": arguments.batch,
        # One for each picture, so that any of them can be drawn again alone.
        "seeds": [(first + index) % (MAX_SEED + 1) for index in range(arguments.batch)],
    }
    if arguments.size is not None:
        call["width"], call["height"] = arguments.size
    return call
