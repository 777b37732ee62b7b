"""`fastdiff generate`: draw pictures of a prompt, also beside stock diffusers."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

from .. import EMBEDDED_CHECKPOINT
from ..errors import UsageError
from .arguments import add_model_arguments, load_pipeline, output_path, positive_int, size

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def add_command(commands) -> None:
    """Register the command with the subparsers of the `fastdiff` command."""
    generate = commands.add_parser("generate", help="draw a picture from a prompt")
    generate.add_argument("prompt")
    picture_path = partial(output_path, suffixes=_IMAGE_SUFFIXES)
    generate.add_argument("-o", "--output", default="out.png", type=picture_path, help="picture to write (out.png)")
    generate.add_argument("--negative-prompt")
    generate.add_argument("--steps", type=positive_int, default=20, help="denoising steps (20)")
    generate.add_argument("--guidance", type=float, default=5.0, help="guidance scale (5.0)")
    generate.add_argument("--size", type=size, metavar="WxH", help="in pixels; the model's own size by default")
    generate.add_argument("--seed", type=int, help="random by default, and printed")
    generate.add_argument("--batch", type=positive_int, default=1, help="pictures of this prompt (1)")
    generate.add_argument("--compare", action="store_true", help="also run stock diffusers; both side by side")
    generate.add_argument("--compiled", metavar="PATH", help="compiled code that `fastdiff warmup` saved")
    add_model_arguments(generate)
    generate.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    if not arguments.prompt.strip():
        raise UsageError("the prompt is empty: say what to draw")
    started = time.perf_counter()
    pipe = load_pipeline(arguments)
    call = _call_arguments(arguments, pipe)
    if arguments.model == EMBEDDED_CHECKPOINT:
        from ..shapes.captions import vocabulary_hint

        hint = vocabulary_hint(arguments.prompt)
        if hint:
            print(hint)
    if arguments.compare:
        return _compare(arguments, pipe, call)
    before = time.perf_counter()
    images = _run(pipe, call)
    seconds = time.perf_counter() - before
    for path in _save(images, arguments.output):
        print(f"wrote {path} (seed {call['seed']})")
    print(f"{len(images)} picture(s) in {seconds:.2f} s, {time.perf_counter() - started:.2f} s with loading")
    return 0


def _compare(arguments: argparse.Namespace, pipe, call: dict) -> int:
    import torch
    from diffusers import StableDiffusionXLPipeline

    from .pictures import psnr, side_by_side

    dtype = torch.float32 if arguments.dtype is None else pipe.unet.dtype
    stock = StableDiffusionXLPipeline.from_pretrained(arguments.model, use_safetensors=True, dtype=dtype)
    stock.to(pipe.device)
    pictures, seconds = {}, {}
    for name, candidate in (("stock", stock), ("fast", pipe)):
        _run(candidate, {**call, "num_inference_steps": 2}, bar=False)
        before = time.perf_counter()
        pictures[name] = _run(candidate, call)
        seconds[name] = time.perf_counter() - before
    dtypes = {"stock": stock.unet.dtype, "fast": pipe.unet.dtype}
    labels = [f"{name}, {str(dtypes[name]).removeprefix('torch.')}, {seconds[name]:.2f} s" for name in pictures]
    pairs = [side_by_side(pair, labels) for pair in zip(*pictures.values(), strict=True)]
    for path, fast, reference in zip(_save(pairs, arguments.output), pictures["fast"], pictures["stock"], strict=True):
        print(f"wrote {path} (seed {call['seed']}), PSNR {psnr(fast, reference):.1f} dB")
    print(f"{labels[0]}; {labels[1]}; stock / fast = {seconds['stock'] / seconds['fast']:.2f}, one warm call each")
    return 0


def _call_arguments(arguments: argparse.Namespace, pipe) -> dict:
    import torch

    seed = arguments.seed if arguments.seed is not None else int(torch.randint(2**31, (1,)))
    call = {
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "num_images_per_prompt": arguments.batch,
        "seed": seed,
    }
    if arguments.size is not None:
        call["width"], call["height"] = arguments.size
    return call


def _run(pipe, call: dict, bar: bool = True):
    import torch

    call = dict(call)
    # A generator on the CPU gives the same noise on every device.
    call["generator"] = torch.Generator("cpu").manual_seed(call.pop("seed"))
    pipe.set_progress_bar_config(disable=not bar)
    return pipe(**call).images


def _save(images, output: Path) -> list[Path]:
    paths = [output] if len(images) == 1 else [
        output.with_stem(f"{output.stem}-{number}") for number in range(1, len(images) + 1)
    ]
    for image, path in zip(images, paths, strict=True):
        partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        image.save(partial)
        partial.replace(path)
    return paths
