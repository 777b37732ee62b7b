"""The entry point: parses the command line and runs one command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

from ..errors import UsageError
from . import batch, bench, explain, generate, serve, tune, warmup
from .arguments import Parser


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
    parser = Parser(prog="fastdiff", description="Stable Diffusion XL at hardware speed.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for command in (generate, explain, warmup, tune, bench, batch, serve):
        command.add_command(commands)
    return parser


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
