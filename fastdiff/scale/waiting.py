"""Requests that wait for their pictures: how many may, for how long, and what they hear meanwhile."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from fastapi import HTTPException

from .requests import PictureRequest

Report = Callable[[int], None]
"""Told how many denoising steps of a picture are done."""

Draw = Callable[[PictureRequest, Report | None], Awaitable["Drawn"]]
"""Draws a request that has a seed; raises `NoWorker`. Cancelled when nobody waits any more."""


@dataclass(frozen=True)
class Limits:
    """What a server accepts: requests at a time, seconds for each, denoising steps, width times height."""

    queue: int = 32
    timeout: float = 120.0
    steps: int = 100
    pixels: int = 2**21


@dataclass(frozen=True)
class Drawn:
    """A finished picture: PNG bytes, "WIDTHxHEIGHT", and the seconds that its batch took."""

    png: bytes
    size: str
    seconds: float


class NoWorker(Exception):
    """The worker that drew the picture died, more than once."""


class WaitingRoom:
    """Admits requests up to a number, and gives each its time. Only the event loop touches it.

    Args:
        draw: what draws.
    """

    def __init__(self, draw: Draw, limits: Limits):
        self._draw, self._limits = draw, limits
        self._seconds = 1.0
        self.count = 0

    def admit(self, request: PictureRequest, report: Report | None = None) -> asyncio.Task[Drawn]:
        """Begin to draw; the task raises `HTTPException` where there will be no picture.

        Raises:
            HTTPException: too many are waiting.
        """
        if self.count >= self._limits.queue:
            # By the time a picture takes now, those that are waiting have been drawn.
            wait = str(min(60, max(1, math.ceil(self._seconds))))
            detail = f"{self._limits.queue} requests are waiting; try again in {wait} s"
            raise HTTPException(429, detail, {"Retry-After": wait})
        self.count += 1
        task = asyncio.create_task(self._picture(request, report))
        started = asyncio.get_running_loop().time()
        task.add_done_callback(lambda _: self._leave(started))
        return task

    def _leave(self, started: float) -> None:
        self.count -= 1
        self._seconds += 0.2 * (asyncio.get_running_loop().time() - started - self._seconds)

    async def _picture(self, request: PictureRequest, report: Report | None) -> Drawn:
        try:
            return await asyncio.wait_for(self._draw(request, report), self._limits.timeout)
        except asyncio.TimeoutError as error:  # noqa: UP041 - another class than TimeoutError before Python 3.11
            raise HTTPException(504, f"not drawn within {self._limits.timeout:g} s") from error
        except NoWorker as error:
            raise HTTPException(503, str(error), {"Retry-After": "10"}) from error


async def events(
    task: asyncio.Task[Drawn], done: asyncio.Queue, describe: Callable[[Drawn], dict], steps: int
) -> AsyncIterator[bytes]:
    """Server-sent events of one picture: `step` for each, then `picture` or `error`. Ends the task when it is left.

    Args:
        done: receives how many steps are done.
        describe: the data of a finished picture.
        steps: of the picture.
    """
    task.add_done_callback(lambda _: done.put_nowait(None))
    try:
        yield _event("step", {"done": 0, "steps": steps})
        while (count := await done.get()) is not None:
            yield _event("step", {"done": count, "steps": steps})
        try:
            yield _event("picture", describe(task.result()))
        except HTTPException as error:
            yield _event("error", {"detail": error.detail})
    finally:
        task.cancel()


def _event(name: str, data: dict) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
