"""Starting Ray, or joining it, and dealing its devices out to workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UsageError
from .artist import ModelChoice


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Join the cluster at `address`, or run one on this machine for the time of the block.

    A cluster of our own sends no usage statistics and starts no dashboard.

    Raises:
        UsageError: the cluster at `address` cannot be joined.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    own = {"include_dashboard": False} if address is None else {}
    try:
        # "local" keeps Ray from joining a cluster that happens to run on this machine.
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address is None:
            raise
        raise UsageError(f"--address {address}: cannot join a Ray cluster there: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def deal_out(
    *,
    model: str | None,
    preset: str,
    dtype: str | None,
    device: str | None,
    replicas: int | None,
    switches: tuple[tuple[str, object], ...] = (),
    loras: tuple[tuple[str, float], ...] = (),
) -> tuple[ModelChoice, int, dict]:
    """Share the cluster's devices among workers: one GPU each, or an equal part of the CPU cores.

    Args:
        model, preset, switches, loras, dtype: as in `ModelChoice`.
        device: "cuda", "cpu" or None for CUDA where the cluster has it.
        replicas: workers; None takes every GPU, or one worker with all cores.

    Returns:
        What each worker loads, how many there are, and what Ray reserves for each.

    Raises:
        UsageError: the cluster has fewer devices than asked for.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    device = device or ("cuda" if gpus else "cpu")
    if device == "cuda":
        if not gpus:
            raise UsageError("--device cuda: the Ray cluster has no GPU")
        count, available, unit = replicas or gpus, gpus, "GPU"
        threads, reserved = max(1, cores // max(count, 1)), {"num_gpus": 1, "num_cpus": 0}
    else:
        count, available, unit = replicas or 1, cores, "CPU core"
        widest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        threads = max(1, min(cores // count, widest))
        reserved = {"num_cpus": threads}
    if count > available:
        raise UsageError(f"--replicas {count}: the Ray cluster has {available} {unit}(s), and each needs one")
    choice = ModelChoice(
        model=model,
        preset=preset,
        switches=switches,
        loras=loras,
        dtype=dtype,
        device=device,
        threads=threads,
    )
    return choice, count, reserved
