"""The `fastdiff` command: generate, explain and warmup."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
import warnings
from pathlib import Path

from . import EMBEDDED_CHECKPOINT

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class UsageError(Exception):
    """Bad input: one line on stderr, exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    try:
        arguments = _parser().parse_args(argv)
        _quiet_libraries()
        return arguments.run(arguments)
    except UsageError as error:
        print(f"fastdiff: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastdiff: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastdiff", description="Stable Diffusion XL at hardware speed.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    generate = commands.add_parser("generate", help="draw a picture from a prompt")
    generate.add_argument("prompt")
    generate.add_argument("-o", "--output", default="out.png", type=_output_path, help="picture to write (out.png)")
    generate.add_argument("--negative-prompt")
    generate.add_argument("--steps", type=_positive_int, default=20, help="denoising steps (20)")
    generate.add_argument("--guidance", type=float, default=5.0, help="guidance scale (5.0)")
    generate.add_argument("--size", type=_size, metavar="WxH", help="in pixels; the model's own size by default")
    generate.add_argument("--seed", type=int, help="random by default, and printed")
    generate.add_argument("--batch", type=_positive_int, default=1, help="pictures of this prompt (1)")
    generate.add_argument("--compare", action="store_true", help="also run stock diffusers; both side by side")
    generate.add_argument("--compiled", metavar="PATH", help="compiled code that `fastdiff warmup` saved")
    _add_model_arguments(generate)
    generate.set_defaults(run=_generate)

    explain = commands.add_parser("explain", help="what fastdiff applies on this machine, and why")
    _add_model_arguments(explain)
    explain.set_defaults(run=_explain)

    warmup = commands.add_parser("warmup", help="compile ahead, and save the compiled code for later processes")
    warmup.add_argument("--size", type=_size, metavar="WxH", help="in pixels; the model's own size by default")
    warmup.add_argument("--batch", type=_positive_int, default=1, help="pictures of a call (1)")
    warmup.add_argument("--save", metavar="PATH", required=True, type=Path, help="file for `generate --compiled`")
    _add_model_arguments(warmup)
    warmup.set_defaults(run=_warmup)

    from .bench.commands import add_commands as add_bench
    from .scale.commands import add_commands

    add_bench(commands)
    add_commands(commands)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=EMBEDDED_CHECKPOINT, help="checkpoint directory or model id (embedded)")
    parser.add_argument("--preset", default="balanced", help="exact, balanced, max or off (balanced)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="by default chosen by preset")
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ... (cuda if there is one)")


def _generate(arguments: argparse.Namespace) -> int:
    if not arguments.prompt.strip():
        raise UsageError("the prompt is empty: say what to draw")
    started = time.perf_counter()
    pipe = _load(arguments)
    call = _call_arguments(arguments, pipe)
    if arguments.model == EMBEDDED_CHECKPOINT:
        from .shapes.captions import vocabulary_hint

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


def _explain(arguments: argparse.Namespace) -> int:
    print(_load(arguments).explain())
    return 0


def _warmup(arguments: argparse.Namespace) -> int:
    pipe = _load(arguments)
    compile_step = next((step for step in pipe.plan if step.name == "compile"), pipe.plan[0])
    if not compile_step.applied:
        raise UsageError(f"nothing to save, as nothing is compiled: {compile_step.reason}")
    side = pipe.default_sample_size * pipe.vae_scale_factor
    started = time.perf_counter()
    pipe.warmup(sizes=[arguments.size or (side, side)], batch_sizes=[arguments.batch])
    pipe.save_compiled(arguments.save)
    print(f"wrote {arguments.save} after {time.perf_counter() - started:.1f} s of compiling")
    return 0


def _load(arguments: argparse.Namespace):
    import torch

    from .config import FastConfig
    from .pipelines import FastStableDiffusionXLPipeline

    options = {} if arguments.dtype is None else {"dtype": getattr(torch, arguments.dtype)}
    try:
        config = FastConfig.preset(arguments.preset)
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"--device {device}: no CUDA device is available here")
        options["compiled"] = getattr(arguments, "compiled", None)
        pipe = FastStableDiffusionXLPipeline.from_pretrained(arguments.model, fast=config, **options)
        return pipe.to(device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error


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


def _output_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in _IMAGE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} must end in one of {', '.join(_IMAGE_SUFFIXES)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist")
    return path


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, for example 1024x768")
    width, height = map(int, match.groups())
    if width % 8 or height % 8 or not width or not height:
        raise argparse.ArgumentTypeError(f"{text!r}: width and height must be positive multiples of 8")
    return width, height


def _positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _quiet_libraries() -> None:
    """Keep the libraries' import-time notices off the console; errors still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
