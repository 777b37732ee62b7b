"""Stock and fast timed in turn, so that a machine whose speed drifts slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def run_interleaved(benchmark, timed: Callable[[], object], peer: Callable[[], object], rounds: int) -> None:
    """Time `timed` with pytest-benchmark and run `peer` before each round, timed by the same clock.

    `extra_info` receives the peer's median and the ratio peer / timed of each round: median, least and greatest.

    Args:
        benchmark: pytest-benchmark's fixture.
        timed: the function whose times make the benchmark's statistics.
        peer: what it is compared with.
        rounds: how many pairs; one more of each runs first, uncounted.
    """
    peer_seconds: list[float] = []

    def run_peer() -> None:
        peer_seconds.append(_seconds(peer))

    benchmark.pedantic(lambda: _synchronized(timed), setup=run_peer, rounds=rounds, warmup_rounds=1)
    seconds = list(benchmark.stats.stats.data)
    peer_seconds = peer_seconds[-rounds:]
    ratios = [other / own for other, own in zip(peer_seconds, seconds, strict=True)]
    benchmark.extra_info.update(
        peer_median_s=round(statistics.median(peer_seconds), 4),
        ratio_median=round(statistics.median(ratios), 3),
        ratio_min=round(min(ratios), 3),
        ratio_max=round(max(ratios), 3),
    )


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    _synchronized(function)
    return time.perf_counter() - started


def _synchronized(function: Callable[[], object]) -> None:
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
