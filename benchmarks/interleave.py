"""Stock and fast timed in turn, so that a machine whose speed drifts slows both alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from fastdiff.bench.timing import Memory, timed


def run_interleaved(
    benchmark, function: Callable[[], object], peer: Callable[[], object], rounds: int, device: str = "cpu"
) -> None:
    """Time `function` with pytest-benchmark and run `peer` before each round, timed by the same clock.

    The device is synchronised inside of what is timed. `extra_info` receives the peer's median, the ratio peer /
    function of each round (median, least and greatest), and the most memory that a call of `function` needed on top
    of what was held before it.

    Args:
        benchmark: pytest-benchmark's fixture.
        function: the function whose times make the benchmark's statistics.
        peer: what it is compared with.
        rounds: how many pairs; one more of each runs first, uncounted.
    """
    peer_seconds: list[float] = []

    def run_peer() -> None:
        peer_seconds.append(timed(peer, device)[0])

    benchmark.pedantic(lambda: timed(function, device), setup=run_peer, rounds=rounds, warmup_rounds=1)
    seconds = list(benchmark.stats.stats.data)
    peer_seconds = peer_seconds[-rounds:]
    ratios = [other / own for other, own in zip(peer_seconds, seconds, strict=True)]
    benchmark.extra_info.update(
        peer_median_s=round(statistics.median(peer_seconds), 6),
        ratio_median=round(statistics.median(ratios), 3),
        ratio_min=round(min(ratios), 3),
        ratio_max=round(max(ratios), 3),
        memory_peak_bytes=_working_memory(function, device),
    )


def run_pair(benchmark, make: Callable[[str], Callable[[], object]], which: str, rounds: int, device: str) -> None:
    """Time one of `make("stock")` and `make("fast")`, with the other as its peer."""
    peer = "fast" if which == "stock" else "stock"
    benchmark.extra_info["peer"] = peer
    run_interleaved(benchmark, make(which), make(peer), rounds, device)


def _working_memory(function: Callable[[], object], device: str) -> int | None:
    memory = Memory(device)
    memory.reset_peak()
    before = memory.current()
    timed(function, device)
    peak = memory.peak()
    return None if peak is None else max(0, peak - before)
