"""What the commands share: types of arguments, the arguments that name a model, and how a pipeline is loaded."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .. import EMBEDDED_CHECKPOINT
from ..errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose complaints are `UsageError`s."""

    def error(self, message: str):
        """Raise in place of printing the usage and leaving."""
        raise UsageError(message)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that loads one pipeline in this process."""
    parser.add_argument("--model", default=EMBEDDED_CHECKPOINT, help="checkpoint directory or model id (embedded)")
    parser.add_argument("--preset", default="balanced", help="exact, balanced, max or off (balanced)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="by default chosen by preset")
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ... (cuda if there is one)")


def load_pipeline(arguments: argparse.Namespace):
    """Load the pipeline that `add_model_arguments` describe, on its device.

    Raises:
        UsageError: whatever is wrong with the checkpoint, the preset or the device.
    """
    import torch

    from ..config import FastConfig
    from ..pipelines import FastStableDiffusionXLPipeline

    options = {} if arguments.dtype is None else {"dtype": getattr(torch, arguments.dtype)}
    try:
        config = FastConfig.preset(arguments.preset)
        device = usable_device(arguments.device)
        options["compiled"] = getattr(arguments, "compiled", None)
        pipe = FastStableDiffusionXLPipeline.from_pretrained(arguments.model, fast=config, **options)
        return pipe.to(device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error


def usable_device(name: str | None):
    """The torch device of a `--device`; by default the GPU if there is one.

    Raises:
        UsageError: there is no such device here.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device {name}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no CUDA device is available here")
    return device


def size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels, multiples of 8."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, for example 1024x768")
    width, height = map(int, match.groups())
    if width % 8 or height % 8 or not width or not height:
        raise argparse.ArgumentTypeError(f"{text!r}: width and height must be positive multiples of 8")
    return width, height


def positive_int(text: str) -> int:
    """A whole number of 1 or more that fits 32 bits."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def port(text: str) -> int:
    """A port number."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port number between 1 and 65535")
    return int(text)


def output_path(text: str, suffixes: tuple[str, ...]) -> Path:
    """A file to write: its folder exists, and its name ends in one of `suffixes`."""
    path = Path(text)
    if path.suffix.lower() not in suffixes:
        raise argparse.ArgumentTypeError(f"{text!r} must end in one of {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist")
    return path
