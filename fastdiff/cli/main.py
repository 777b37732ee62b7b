"""The entry point: parses the command line and runs one command."""

from __future__ import annotations

import argparse
import sys

from ..errors import UsageError
from . import batch, bench, demo, explain, generate, serve, tune, warmup
from .arguments import Parser
from .loading import quiet_libraries


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    try:
        arguments = _parser().parse_args(argv)
        # All that can be said without a library, whose import takes seconds.
        arguments.check(arguments)
        quiet_libraries()
        return arguments.run(arguments)
    except UsageError as error:
        print(f"fastdiff: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastdiff: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastdiff", description="Stable Diffusion XL at hardware speed.")
    parser.set_defaults(check=lambda arguments: None)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for command in (generate, demo, explain, warmup, tune, bench, batch, serve):
        command.add_command(commands)
    return parser
