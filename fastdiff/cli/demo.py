"""`fastdiff demo`: pictures and times, stock beside fast, in one command and one picture, without a download."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from .. import EMBEDDED_CHECKPOINT
from ..bench.names import SDXL_RANDOM
from .arguments import device, output_path
from .loading import usable_device

PROMPTS = (
    "a red circle on a white background",
    "a large yellow star on a blue background",
    "a green triangle at the left of a pink background",
    "a purple heart on a black background",
    "a blue square to the left of a red heart on a white background",
    "a large orange heart on a gray background",
)
_SEED, _STEPS = 11, 20
# SDXL's UNet at full size, held once for stock and once for fastdiff, and room to work.
_PARAMETERS, _ROOM = 2_567_463_684, 2 * 2**30


def add_command(commands) -> None:
    """Register the command with the subparsers of the `fastdiff` command."""
    demo = commands.add_parser("demo", help="pictures and times, stock beside fast, without a download")
    picture_path = partial(output_path, suffixes=(".png",))
    demo.add_argument(
        "-o", "--output", default=Path("demo.png"), type=picture_path, help="picture to write (demo.png)"
    )
    demo.add_argument("--device", type=device, help="cuda, cpu, ... (cuda if there is one)")
    demo.add_argument("--no-full-size", action="store_true", help="no step of full size, which needs 12 to 21 GiB")
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from .poster import poster

    where = usable_device(arguments.device)
    print(f"1/2  {len(PROMPTS)} pictures by the embedded model, stock and fast, on the same seeds", flush=True)
    stock, fast, closeness = _grid(where)
    print(f"     PSNR between the two: {closeness:.1f} dB or more", flush=True)
    results = None if arguments.no_full_size else _full_size_step(where)
    poster(PROMPTS, stock, fast, closeness, results).save(arguments.output)
    print(f"wrote {arguments.output}")
    return 0


def _grid(where) -> tuple[list, list, float]:
    """The prompts drawn by stock and by fast, in one dtype; and the least PSNR between two that belong together."""
    from diffusers import StableDiffusionXLPipeline

    from ..pipelines import FastStableDiffusionXLPipeline
    from .pictures import draw, psnr

    fast = FastStableDiffusionXLPipeline.from_pretrained(EMBEDDED_CHECKPOINT).to(where)
    stock = StableDiffusionXLPipeline.from_pretrained(EMBEDDED_CHECKPOINT, dtype=fast.unet.dtype).to(where)
    call = {
        "prompt": list(PROMPTS),
        "num_inference_steps": _STEPS,
        "seeds": [_SEED + index for index in range(len(PROMPTS))],
    }
    expected, drawn = (draw(pipe, call) for pipe in (stock, fast))
    return expected, drawn, min(psnr(own, other) for own, other in zip(drawn, expected, strict=True))


def _full_size_step(where) -> dict | None:
    """Time a step of SDXL's UNet at full size, stock and fast in turn; None where it does not fit."""
    import torch

    from ..bench.ladder import rungs_for
    from ..bench.run import run_ladder
    from ..bench.settings import REFERENCE, Settings
    from ..bench.table import ratio, seconds, shows_nothing
    from ..bench.timing import free_memory, spread
    from ..config import FastConfig
    from ..pipelines.checkpoints import loading_dtype

    dtype = loading_dtype(FastConfig.preset("balanced"))
    free, needed = free_memory(where), 2 * _PARAMETERS * dtype.itemsize + _ROOM
    if free is not None and free < needed:
        sizes = f"{needed / 2**30:.0f} GiB of memory in {str(dtype).removeprefix('torch.')}"
        print(f"2/2  left out: SDXL at full size needs {sizes}, and {free / 2**30:.1f} GiB are free")
        return None
    # So that it takes a minute or two: a CPU without bfloat16 computes four times as long.
    edge = 1024 if where.type == "cuda" else 256 if dtype == torch.bfloat16 else 128
    print(f"2/2  a step of SDXL's UNet at full size, random weights, {edge}x{edge}: stock and fast in turn", flush=True)
    settings = Settings(
        model=SDXL_RANDOM,
        size=(edge, edge),
        measures=("step",),
        dtype=dtype,
        device=str(where),
        rounds=3,
        seconds=60,
    )
    # Stock is timed beside the default in any case, and needs no turn of its own.
    results = run_ladder(settings, [rung for rung in rungs_for(settings, ["balanced"]) if rung.name != REFERENCE])
    rung = results["rungs"]["balanced"]
    own, ratios = rung["times"]["step"], rung["ratios"]["step"][REFERENCE]
    beside = spread([mine * times for mine, times in zip(own["all"], ratios["all"], strict=True)])
    print(f"     {'stock diffusers':<20}{seconds(beside['median']):>8}  ({_range(beside)})")
    print(f"     {'fastdiff':<20}{seconds(own['median']):>8}  ({_range(own)})   stock / fastdiff = {ratio(ratios)}")
    if shows_nothing(ratios):
        print("     no result: the ratio spreads over 1, or comes from too few rounds")
    return {**results, "stock": beside, "fast": own, "ratio": ratios}


def _range(times: dict) -> str:
    from ..bench.table import seconds

    return f"{seconds(times['min'])} - {seconds(times['max'])}"
