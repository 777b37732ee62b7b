"""What draws for a server, in one process: a warm pipeline behind a batcher."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .artist import Artist, png_bytes
from .batching import Batcher
from .requests import PictureRequest
from .waiting import Drawn, Report


@dataclass(frozen=True)
class _Order:
    request: PictureRequest
    report: Report


class Painter:
    """Draws requests as they come, together where they can be.

    Args:
        artist: the pipeline.
        max_batch: pictures of the model's own size drawn together.
        count: told after each call how many pictures it drew.
    """

    def __init__(self, artist: Artist, max_batch: int, count: Callable[[int], None] = lambda pictures: None):
        self._artist, self._count = artist, count
        self._batcher: Batcher[_Order, Drawn] = Batcher(
            self._paint,
            key=lambda order: artist.batch_key(order.request),
            limit=lambda order: artist.batch_limit(order.request, max_batch),
        )

    async def draw(self, request: PictureRequest, report: Report | None = None) -> Drawn:
        """Draw one picture; `report` is told, on the caller's event loop, how many steps are done."""
        loop = asyncio.get_running_loop()

        def tell(done: int) -> None:
            if report is not None:
                loop.call_soon_threadsafe(report, done)  # drawing is in a thread

        return await self._batcher.submit(_Order(request, tell))

    def _paint(self, orders: Sequence[_Order], wanted: Callable[[], bool]) -> list[Drawn]:
        def after_step(done: int) -> bool:
            for order in orders:
                order.report(done)
            return wanted()

        started = time.perf_counter()
        pictures = self._artist.draw([order.request for order in orders], after_step)
        self._count(len(orders))
        seconds = time.perf_counter() - started
        return [Drawn(png_bytes(one), f"{one.width}x{one.height}", seconds) for one in pictures]
