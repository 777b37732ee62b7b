"""`fastdiff bench`: arguments, their checks, and what is run."""

from __future__ import annotations

import argparse
import importlib.util
from functools import partial
from pathlib import Path

from .. import EMBEDDED_CHECKPOINT
from ..bench.names import MEASURES, SDXL_RANDOM, check_rungs
from ..checkpoint import EMBEDDED, find_checkpoint
from ..errors import UsageError
from .arguments import device, guidance, output_path, positive_int, size, steps
from .hub import check_model
from .loading import usable_device

_PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def add_command(commands) -> None:
    """Register the command with the subparsers of the `fastdiff` command."""
    bench = commands.add_parser("bench", help="what each optimisation buys on this machine")
    bench.add_argument(
        "--model",
        default=EMBEDDED,
        type=find_checkpoint,
        help=f"checkpoint directory or model id (embedded); {SDXL_RANDOM}: full size, random weights, no download",
    )
    bench.add_argument("--size", type=size, metavar="WxH", help="in pixels; the model's own size by default")
    bench.add_argument("--steps", type=steps, default=20, help="denoising steps of a picture (20)")
    bench.add_argument("--batch", type=positive_int, default=1, help="pictures of a call (1)")
    bench.add_argument("--guidance", type=guidance, default=5.0, help="scale; 1 is without, as for LCM or Turbo (5)")
    bench.add_argument(
        "--measure", choices=MEASURES, default="picture", help="what is timed (picture)"
    )
    bench.add_argument("--rungs", metavar="A,B,...", help="by name; all by default, which --list-rungs shows")
    bench.add_argument("--list-rungs", action="store_true", help="print the rungs' names and stop")
    bench.add_argument("--rounds", type=positive_int, default=7, help="timed calls of each rung (7)")
    bench.add_argument("--seconds", type=positive_int, default=60, help="at most, about, for a rung's calls (60)")
    bench.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 where it is computed natively")
    bench.add_argument("--device", type=device, help="cuda, cpu, ... (cuda if there is one)")
    json_path, plot_path = partial(output_path, suffixes=(".json",)), partial(output_path, suffixes=_PLOT_SUFFIXES)
    bench.add_argument("--json", type=json_path, metavar="FILE", help="results, saved after each rung; resumes")
    bench.add_argument("--plot", type=plot_path, metavar="FILE", help="waterfall picture, .png, .svg or .pdf")
    bench.set_defaults(check=_check, run=_run)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: run pip install '.[bench]' in the folder of fastdiff's sources")
    try:
        check_rungs(_rungs(arguments))
    except ValueError as error:
        raise UsageError(f"--rungs: {error}") from error
    if arguments.model != SDXL_RANDOM:
        check_model(arguments.model)


def _rungs(arguments: argparse.Namespace) -> list[str]:
    return [] if arguments.rungs is None else arguments.rungs.split(",")


def _run(arguments: argparse.Namespace) -> int:
    from ..bench.ladder import LADDER, rungs_for

    if arguments.list_rungs:
        for rung in LADDER:
            print(f"{rung.name:<25}{rung.label}")
        return 0
    from ..bench.run import OtherRunError, run_ladder
    from ..bench.table import table

    settings = _settings(arguments)
    rungs = rungs_for(settings, _rungs(arguments) or None)
    name = "embedded" if arguments.model == EMBEDDED_CHECKPOINT else Path(arguments.model).name
    try:
        results = run_ladder(settings, rungs, arguments.json, name)
    except OtherRunError as error:
        raise UsageError(f"--json: {error}") from error
    print(table(results))
    if arguments.plot is not None:
        from ..bench.plot import draw

        draw(results, arguments.plot)
    for path in (arguments.json, arguments.plot):
        if path is not None:
            print(f"wrote {path}")
    return 0


def _settings(arguments: argparse.Namespace):
    import torch

    from ..bench.settings import Settings
    from ..config import FastConfig
    from ..pipelines.checkpoints import loading_dtype

    preset = FastConfig.preset("balanced")
    return Settings(
        model=arguments.model,
        size=arguments.size or _native_size(arguments.model),
        steps=arguments.steps,
        batch=arguments.batch,
        guidance=arguments.guidance,
        measures=(arguments.measure,),
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else loading_dtype(preset),
        device=str(usable_device(arguments.device)),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )


def _native_size(model: str) -> tuple[int, int]:
    from diffusers import UNet2DConditionModel

    if model == SDXL_RANDOM:
        return 1024, 1024
    edge = 8 * UNet2DConditionModel.load_config(model, subfolder="unet")["sample_size"]
    return edge, edge
