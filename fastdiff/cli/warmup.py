"""`fastdiff warmup`: compile ahead, for later processes."""

from __future__ import annotations

import argparse
import time

from ..errors import UsageError
from .arguments import add_model_arguments, output_path, positive_int, size
from .loading import check_model_arguments, load_pipeline


def add_command(commands) -> None:
    """Register the command with the subparsers of the `fastdiff` command."""
    warmup = commands.add_parser("warmup", help="compile ahead, and save the compiled code for later processes")
    warmup.add_argument("--size", type=size, metavar="WxH", help="in pixels; the model's own size by default")
    warmup.add_argument("--batch", type=positive_int, default=1, help="pictures of a call (1)")
    warmup.add_argument("--save", metavar="FILE", required=True, type=output_path, help="for `generate --compiled`")
    add_model_arguments(warmup)
    warmup.set_defaults(check=check_model_arguments, run=_warmup)


def _warmup(arguments: argparse.Namespace) -> int:
    pipe = load_pipeline(arguments)
    compile_step = next((step for step in pipe.plan if step.name == "compile"), pipe.plan[0])
    if not compile_step.applied:
        raise UsageError(
            f"nothing to save, as nothing is compiled ({compile_step.reason}); --compile regional compiles all the same"
        )
    side = pipe.default_sample_size * pipe.vae_scale_factor
    started = time.perf_counter()
    pipe.warmup(sizes=[arguments.size or (side, side)], batch_sizes=[arguments.batch])
    pipe.save_compiled(arguments.save)
    print(f"wrote {arguments.save} after {time.perf_counter() - started:.1f} s of compiling")
    return 0
