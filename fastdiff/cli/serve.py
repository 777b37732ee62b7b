"""`fastdiff serve`: answer HTTP requests for pictures."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from .. import EMBEDDED_CHECKPOINT
from ..errors import UsageError
from .arguments import port, positive_int
from .workers import add_worker_arguments, check_worker_arguments, worker_settings

_KEY_VARIABLE = "FASTDIFF_API_KEY"
_SHORTEST_KEY = 16


def add_command(commands) -> None:
    """Register the command with the subparsers of the `fastdiff` command."""
    serve = commands.add_parser("serve", help="answer HTTP requests for pictures, with dynamic batching")
    serve.add_argument("--host", default="127.0.0.1", help=f"anything else needs {_KEY_VARIABLE} (127.0.0.1)")
    serve.add_argument("--port", type=port, default=8000, help="(8000)")
    serve.add_argument("--max-batch", type=positive_int, default=4, help="pictures drawn together (4)")
    serve.add_argument("--queue", type=positive_int, default=32, help="requests at a time, more get 429 (32)")
    serve.add_argument("--timeout", type=positive_int, default=120, help="seconds until a 504 (120)")
    serve.add_argument("--max-steps", type=positive_int, default=100, help="(100)")
    serve.add_argument("--max-pixels", type=positive_int, default=2**21, help="width x height (2097152)")
    serve.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"key for clients to send; or set {_KEY_VARIABLE}"
    )
    add_worker_arguments(serve)
    serve.set_defaults(check=_check, run=_run_serve)


def _check(arguments: argparse.Namespace) -> None:
    check_worker_arguments(arguments)
    from ..scale.listening import check_port, is_loopback

    arguments.key = _api_key(arguments.api_key_file)
    if arguments.key is None and not is_loopback(arguments.host):
        raise UsageError(
            f"--host {arguments.host}: others could reach the server; set {_KEY_VARIABLE} or --api-key-file "
            f"to a key of {_SHORTEST_KEY} or more characters; clients send it as 'Authorization: Bearer KEY'"
        )
    if arguments.address is None:
        check_port(arguments.host, arguments.port)


def _run_serve(arguments: argparse.Namespace) -> int:
    from ..scale.cluster import deal_out, ray_cluster
    from ..scale.gate import key_digest
    from ..scale.serve import run_server
    from ..scale.waiting import Limits

    hint = None
    if arguments.model == EMBEDDED_CHECKPOINT:
        from ..shapes.captions import vocabulary_line

        hint = vocabulary_line()
        print(hint, flush=True)
    limits = Limits(
        queue=arguments.queue,
        timeout=arguments.timeout,
        steps=arguments.max_steps,
        pixels=arguments.max_pixels,
    )
    with ray_cluster(arguments.address):
        choice, replicas, reserved = deal_out(**worker_settings(arguments))
        run_server(
            choice,
            replicas,
            reserved,
            limits,
            max_batch=arguments.max_batch,
            host=arguments.host,
            port=arguments.port,
            digest=None if arguments.key is None else key_digest(arguments.key),
            hint=hint,
            shared=arguments.address is not None,
        )
    return 0


def _api_key(file: Path | None) -> str | None:
    try:
        key = os.environ.get(_KEY_VARIABLE) if file is None else file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {str(file)!r} cannot be read: {error}") from error
    if key is not None and not re.fullmatch(rf"[!-~]{{{_SHORTEST_KEY},}}", key):
        raise UsageError(
            f"the API key must be {_SHORTEST_KEY} or more printable ASCII characters without spaces"
        )
    return key
