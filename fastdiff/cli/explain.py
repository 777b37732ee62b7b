"""`fastdiff explain`: what is applied on this machine, and why."""

from __future__ import annotations

import argparse

from .arguments import add_model_arguments
from .loading import check_model_arguments, load_pipeline


def add_command(commands) -> None:
    """Register the command with the subparsers of the `fastdiff` command."""
    explain = commands.add_parser("explain", help="what fastdiff applies on this machine, and why")
    add_model_arguments(explain)
    explain.set_defaults(check=check_model_arguments, run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    print(load_pipeline(arguments).explain())
    return 0
