"""`fastdiff batch` and `fastdiff serve`: arguments, their checks, and what is run."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from pathlib import Path

from .. import EMBEDDED_CHECKPOINT, cli

_KEY_VARIABLE = "FASTDIFF_API_KEY"
_SHORTEST_KEY = 16


def add_commands(commands) -> None:
    """Register both commands with the subparsers of the `fastdiff` command."""
    batch = commands.add_parser("batch", help="draw a file of prompts, on a machine or a Ray cluster")
    batch.add_argument("prompts", type=Path, help="JSON lines with prompt, and seed, size, steps, ...")
    batch.add_argument("--out", type=Path, required=True, metavar="DIR", help="pictures and manifest.jsonl")
    _add_worker_arguments(batch)
    batch.set_defaults(run=_run_batch)

    serve = commands.add_parser("serve", help="answer HTTP requests for pictures, with dynamic batching")
    serve.add_argument("--host", default="127.0.0.1", help=f"anything else needs {_KEY_VARIABLE} (127.0.0.1)")
    serve.add_argument("--port", type=_port, default=8000, help="(8000)")
    serve.add_argument("--max-batch", type=_positive, default=4, help="pictures drawn together (4)")
    serve.add_argument("--queue", type=_positive, default=32, help="requests at a time, more get 429 (32)")
    serve.add_argument("--timeout", type=_positive, default=120, help="seconds until a 504 (120)")
    serve.add_argument("--max-steps", type=_positive, default=100, help="(100)")
    serve.add_argument("--max-pixels", type=_positive, default=2**21, help="width x height (2097152)")
    serve.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"key for clients to send; or set {_KEY_VARIABLE}"
    )
    _add_worker_arguments(serve)
    serve.set_defaults(run=_run_serve)


def _add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=EMBEDDED_CHECKPOINT, help="checkpoint or model id (embedded)")
    parser.add_argument("--preset", default="balanced", help="exact, balanced, max or off (balanced)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="chosen by preset")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="of the workers (cuda if there is one)")
    parser.add_argument("--replicas", type=_positive, help="workers (one for each GPU, or one on the CPU)")
    parser.add_argument("--address", help="of a Ray cluster; by default one is started on this machine")


def _run_batch(arguments: argparse.Namespace) -> int:
    _need("ray.data")
    worker = _worker_settings(arguments)
    from .folder import OutputFolder
    from .rows import read_rows

    settings = {name: worker[name] for name in ("model", "preset", "dtype")}
    rows = read_rows(arguments.prompts, settings)
    folder = OutputFolder(arguments.out)
    try:
        missing = 0
        if any(row.key not in folder.done for row in rows):
            from .batch import run_batch
            from .cluster import deal_out, ray_cluster

            with ray_cluster(arguments.address):
                choice, replicas, reserved = deal_out(**worker)
                missing = run_batch(rows, folder, choice, replicas, reserved)
    finally:
        folder.close()
    print(f"{len(rows) - missing} of {len(rows)} pictures in {arguments.out}")
    if missing:
        print("run the same command again to try the missing ones")
    return 1 if missing else 0


def _run_serve(arguments: argparse.Namespace) -> int:
    _need("ray.serve")
    from .gate import is_loopback, key_digest

    key = _api_key(arguments.api_key_file)
    if key is None and not is_loopback(arguments.host):
        raise cli.UsageError(
            f"--host {arguments.host}: others could reach the server; set {_KEY_VARIABLE} or --api-key-file "
            f"to a key of {_SHORTEST_KEY} or more characters; clients send it as 'Authorization: Bearer KEY'"
        )
    worker = _worker_settings(arguments)
    from .app import Limits
    from .cluster import deal_out, ray_cluster
    from .serve import check_port, run_server

    limits = Limits(
        queue=arguments.queue,
        timeout=arguments.timeout,
        steps=arguments.max_steps,
        pixels=arguments.max_pixels,
    )
    if arguments.address is None:
        check_port(arguments.host, arguments.port)
    with ray_cluster(arguments.address):
        choice, replicas, reserved = deal_out(**worker)
        run_server(
            choice,
            replicas,
            reserved,
            limits,
            max_batch=arguments.max_batch,
            host=arguments.host,
            port=arguments.port,
            digest=None if key is None else key_digest(key),
        )
    return 0


def _need(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise cli.UsageError(f"this command needs Ray ({error}): pip install 'fastdiff[ray]'") from error


def _worker_settings(arguments: argparse.Namespace) -> dict:
    """Check model and preset here, once, rather than in every worker."""
    from ..checkpoints import check_checkpoint
    from ..config import FastConfig
    from ..pipelines import FastStableDiffusionXLPipeline

    try:
        FastConfig.preset(arguments.preset)
        if arguments.address is None:  # the workers of a cluster may see files that this machine does not
            check_checkpoint(FastStableDiffusionXLPipeline, arguments.model, {})
    except ValueError as error:
        raise cli.UsageError(str(error)) from error
    return {
        "model": None if arguments.model == EMBEDDED_CHECKPOINT else arguments.model,
        "preset": arguments.preset,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "replicas": arguments.replicas,
    }


def _api_key(file: Path | None) -> str | None:
    try:
        key = os.environ.get(_KEY_VARIABLE) if file is None else file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise cli.UsageError(f"--api-key-file {str(file)!r} cannot be read: {error}") from error
    if key is not None and not re.fullmatch(rf"[!-~]{{{_SHORTEST_KEY},}}", key):
        raise cli.UsageError(
            f"the API key must be {_SHORTEST_KEY} or more printable ASCII characters without spaces"
        )
    return key


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port number between 1 and 65535")
    return int(text)
