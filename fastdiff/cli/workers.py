"""What `batch` and `serve` share: the arguments of their workers, checked once."""

from __future__ import annotations

import argparse
import importlib

from .. import EMBEDDED_CHECKPOINT
from ..errors import UsageError
from .arguments import positive_int


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=EMBEDDED_CHECKPOINT, help="checkpoint or model id (embedded)")
    parser.add_argument("--preset", default="balanced", help="exact, balanced, max or off (balanced)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="chosen by preset")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="of the workers (cuda if there is one)")
    parser.add_argument("--replicas", type=positive_int, help="workers (one for each GPU, or one on the CPU)")
    parser.add_argument("--address", help="of a Ray cluster; by default one is started on this machine")


def need(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"this command needs Ray ({error}): pip install 'fastdiff[ray]'") from error


def worker_settings(arguments: argparse.Namespace) -> dict:
    """Check model and preset here, once, rather than in every worker."""
    from ..config import FastConfig
    from ..pipelines.checkpoints import check_checkpoint
    from ..pipelines.sdxl import FastStableDiffusionXLPipeline

    try:
        FastConfig.preset(arguments.preset)
        if arguments.address is None:  # the workers of a cluster may see files that this machine does not
            check_checkpoint(FastStableDiffusionXLPipeline, arguments.model, {})
    except ValueError as error:
        raise UsageError(str(error)) from error
    return {
        "model": None if arguments.model == EMBEDDED_CHECKPOINT else arguments.model,
        "preset": arguments.preset,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "replicas": arguments.replicas,
    }
