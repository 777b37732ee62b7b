"""What `batch` and `serve` share: the arguments of their workers, checked once."""

from __future__ import annotations

import argparse
import importlib.util
import re
import socket

from .. import EMBEDDED_CHECKPOINT
from ..errors import UsageError
from .arguments import add_configuration, fast_config, positive_int, switches
from .hub import check_model

_CONNECT_SECONDS = 3.0


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what each worker loads, and where workers run."""
    parser.add_argument("--device", choices=("cuda", "cpu"), help="of the workers (cuda if there is one)")
    parser.add_argument("--replicas", type=positive_int, help="workers (one for each GPU, or one on the CPU)")
    parser.add_argument("--address", help="of a Ray cluster; by default one is started on this machine")
    add_configuration(parser)


def check_worker_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what the arguments of the workers can get wrong, here, once, and before any library is imported."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("this command needs Ray: run pip install '.[ray]' in the folder of fastdiff's sources")
    fast_config(arguments)
    if arguments.address is not None:
        _check_address(arguments.address)  # its workers may see files that this machine does not
    else:
        check_model(arguments.model)


def worker_settings(arguments: argparse.Namespace) -> dict:
    """What the workers load, as `deal_out` takes it."""
    return {
        "model": None if arguments.model == EMBEDDED_CHECKPOINT else arguments.model,
        "preset": arguments.preset,
        "switches": tuple(sorted(switches(arguments).items())),
        "loras": tuple(arguments.lora or ()),
        "dtype": arguments.dtype,
        "device": arguments.device,
        "replicas": arguments.replicas,
    }


def _check_address(address: str) -> None:
    """Ray would try for minutes to reach an address where nothing answers, and then not say so."""
    if address in ("auto", "local"):
        return
    match = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d+)", address)
    if not match:
        raise UsageError(f"--address {address}: write HOST:PORT, ray://HOST:PORT or auto")
    host, port = match[1], int(match[2])
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--address {address}: no Ray cluster answers there: {reason}") from error
