"""`fastdiff batch`: a file of prompts, on a machine or a Ray cluster."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import input_file
from .workers import add_worker_arguments, check_worker_arguments, worker_settings


def add_command(commands) -> None:
    """Register the command with the subparsers of the `fastdiff` command."""
    batch = commands.add_parser("batch", help="draw a file of prompts, on a machine or a Ray cluster")
    batch.add_argument("prompts", type=input_file, help="JSON lines with prompt, and seed, size, steps, ...")
    batch.add_argument("--out", type=Path, required=True, metavar="DIR", help="pictures and manifest.jsonl")
    add_worker_arguments(batch)
    batch.set_defaults(check=_check, run=_run_batch)


def _check(arguments: argparse.Namespace) -> None:
    check_worker_arguments(arguments)
    from ..scale.rows import read_rows

    worker = worker_settings(arguments)
    settings = {name: worker[name] for name in ("model", "preset", "dtype")}
    if worker["switches"]:
        settings["switches"] = worker["switches"]
    if worker["loras"]:
        settings["loras"] = worker["loras"]
    arguments.rows = read_rows(arguments.prompts, settings)


def _run_batch(arguments: argparse.Namespace) -> int:
    from ..scale.folder import OutputFolder

    rows = arguments.rows
    folder = OutputFolder(arguments.out)
    try:
        missing = 0
        if any(row.key not in folder.done for row in rows):
            from ..scale.batch import run_batch
            from ..scale.cluster import deal_out, ray_cluster

            with ray_cluster(arguments.address):
                choice, replicas, reserved = deal_out(**worker_settings(arguments))
                missing = run_batch(rows, folder, choice, replicas, reserved)
    finally:
        folder.close()
    print(f"{len(rows) - missing} of {len(rows)} pictures in {arguments.out}")
    if missing:
        print("run the same command again to try the missing ones")
    return 1 if missing else 0
