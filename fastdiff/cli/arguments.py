"""What the commands share: types of arguments, and the arguments that choose a model and what is applied to it.

Nothing here needs a library, so that what is mistyped is refused at once.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from functools import partial
from pathlib import Path

from ..checkpoint import EMBEDDED, find_checkpoint
from ..config import COMPILE_MODES, QUANTIZATION_SCHEMES, FastConfig
from ..errors import UsageError
from ..limits import MAX_GUIDANCE, MAX_SEED, MAX_STEPS, MIN_SIDE, SIDE_STEP, split_lora

DTYPES = ("float32", "bfloat16", "float16")
_SWITCHES = ("compile", "quantization", "guidance_interval", "deep_cache_interval", "tuning")


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose complaints are `UsageError`s."""

    def error(self, message: str):
        """Raise in place of printing the usage and leaving."""
        raise UsageError(message)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that loads one pipeline in this process."""
    parser.add_argument("--device", type=device, help="cuda, cuda:1, cpu, ... (cuda if there is one)")
    add_configuration(parser)


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose the model and what is applied to it."""
    parser.add_argument(
        "--model", default=EMBEDDED, type=find_checkpoint, help="checkpoint directory or model id (embedded)"
    )
    parser.add_argument("--preset", default="balanced", help="exact, balanced, max or off (balanced)")
    parser.add_argument("--dtype", choices=DTYPES, help="by default chosen by preset")
    parser.add_argument(
        "--lora", action="append", type=lora, metavar="FILE[:WEIGHT]", help="adapter to draw with; may be repeated"
    )
    parser.add_argument("--compile", choices=COMPILE_MODES, help="in place of the preset's")
    parser.add_argument("--quantization", choices=QUANTIZATION_SCHEMES, help="in place of the preset's")
    parser.add_argument(
        "--guidance-interval", type=interval, metavar="A,B", help="lossy: guidance from A to B of the steps, as 0.1,0.8"
    )
    parser.add_argument(
        "--deep-cache-interval", type=positive_int, metavar="N", help="lossy: inner blocks in every N-th step, as 2"
    )
    parser.add_argument("--tuning", metavar="FILE", help="what was measured on machines of this kind, or off (auto)")


def switches(arguments: argparse.Namespace) -> dict:
    """The fields of `FastConfig` that were given."""
    return {name: value for name in _SWITCHES if (value := getattr(arguments, name)) is not None}


def fast_config(arguments: argparse.Namespace) -> FastConfig:
    """The configuration that the arguments of `add_configuration` describe.

    Raises:
        UsageError: an unknown preset, or switches that do not go together.
    """
    try:
        return FastConfig.preset(arguments.preset, **switches(arguments))
    except ValueError as error:
        raise UsageError(str(error)) from error


def device(text: str) -> str:
    """A torch device by name; whether it is there shows later."""
    if not re.fullmatch(r"(cpu|cuda|xpu|mps|hpu)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; write cpu, cuda, cuda:1, xpu or mps")
    return text


def size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels, multiples of 8."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, for example 1024x768")
    width, height = map(int, match.groups())
    if width % SIDE_STEP or height % SIDE_STEP or min(width, height) < MIN_SIDE:
        raise argparse.ArgumentTypeError(
            f"{text!r}: width and height must be multiples of {SIDE_STEP}, and {MIN_SIDE} or more"
        )
    return width, height


def whole(text: str, least: int, most: int) -> int:
    """A whole number between two others."""
    if not (text.isascii() and text.isdigit() and least <= int(text[:40]) <= most):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)


positive_int = partial(whole, least=1, most=2**31 - 1)
steps = partial(whole, least=1, most=MAX_STEPS)
seed = partial(whole, least=0, most=MAX_SEED)
port = partial(whole, least=1, most=65535)


def guidance(text: str) -> float:
    """A guidance scale."""
    value = _number(text)
    if not 0 <= value <= MAX_GUIDANCE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {MAX_GUIDANCE}")
    return value


def interval(text: str) -> tuple[float, float]:
    """START,END as fractions of the steps."""
    start, _, end = text.partition(",")
    pair = _number(start), _number(end)
    if not 0 <= pair[0] < pair[1] <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not START,END with 0 <= START < END <= 1, for example 0.1,0.8")
    return pair


def input_file(text: str) -> Path:
    """A file to read."""
    if not Path(text).is_file():
        reason = "is a directory" if Path(text).is_dir() else "does not exist"
        raise argparse.ArgumentTypeError(f"the file {text!r} {reason}")
    return Path(text)


def lora(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT of a LoRA."""
    file, weight = split_lora(text)
    return str(input_file(file)), weight


def output_path(text: str, suffixes: tuple[str, ...] = ()) -> Path:
    """A file to write: its folder can be written to, and its name ends in one of `suffixes`, if there are any."""
    path = Path(text)
    if suffixes and path.suffix.lower() not in suffixes:
        raise argparse.ArgumentTypeError(f"{text!r} must end in one of {', '.join(suffixes)}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} cannot be written to")
    return path


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
