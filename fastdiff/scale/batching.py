"""Dynamic batching: requests that can share a call of the pipeline do, in order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Runs one batch at a time in a thread; what arrives meanwhile forms the next batches.

    Nothing waits for company: an idle worker starts at once. The oldest waiting item goes next, and takes
    along those that can share its batch. Items whose caller has gone are dropped before they are run. Unlike
    `ray.serve.batch` it keeps incompatible items apart: no answer waits for a batch of another kind.

    Args:
        run: turns a batch into as many results, in a thread. Its second argument tells whether a caller still
            waits.
        key: items with equal keys can share a batch.
        limit: the largest batch for an item.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item], Callable[[], bool]], Sequence[Result]],
        key: Callable[[Item], object],
        limit: Callable[[Item], int],
    ):
        self._run, self._key, self._limit = run, key, limit
        self._waiting: list[tuple[Item, asyncio.Future]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._worker: asyncio.Task | None = None

    async def submit(self, item: Item) -> Result:
        """Give an item to a batch; returns its result or raises what its batch raised."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            items, futures = zip(*batch, strict=True)

            def wanted(futures=futures) -> bool:
                return not all(future.done() for future in futures)

            try:
                results = await loop.run_in_executor(self._thread, self._run, items, wanted)
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, result in zip(futures, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _next_batch(self) -> list[tuple[Item, asyncio.Future]]:
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]
        if not self._waiting:
            return []
        oldest = self._waiting[0][0]
        key, limit = self._key(oldest), self._limit(oldest)
        batch = [entry for entry in self._waiting if self._key(entry[0]) == key][:limit]
        chosen = {id(entry) for entry in batch}
        self._waiting = [entry for entry in self._waiting if id(entry) not in chosen]
        return batch
