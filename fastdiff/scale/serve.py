"""The server on Ray Serve: one deployment answers HTTP, another draws, each replica with a warm pipeline."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.util.metrics import Counter

from ..errors import UsageError
from .app import make_app
from .artist import Artist, ModelChoice
from .listening import is_loopback
from .painter import Painter
from .requests import PictureRequest
from .waiting import Drawn, Limits, NoWorker, Report

_APPLICATION, _PAINTER, _DOOR = "fastdiff", "painter", "door"
_TRIES = 3
_SLICE = 0.2  # seconds
# Seconds between looks whether a replica that is to stop is idle, 2 by default, and for it to become so, 20 by default.
_STOPPING = {"graceful_shutdown_wait_loop_s": 0.1, "graceful_shutdown_timeout_s": 5.0}
_RUNNING = "RUNNING"


class _Painter:
    """A replica that draws."""

    def __init__(self, choice: ModelChoice, max_batch: int):
        artist = Artist(choice)
        artist.warm_up(max_batch)
        # Two counters and no histogram: Ray takes a histogram's sum from the middles of its buckets.
        self._pictures = Counter("fastdiff_pictures", "pictures drawn")
        self._batches = Counter("fastdiff_batches", "calls of the pipeline that drew them")
        self._painter = Painter(artist, max_batch, self._count)

    async def draw(self, request: PictureRequest) -> Drawn:
        return await self._painter.draw(request)

    async def watch(self, request: PictureRequest) -> AsyncIterator[int | Drawn]:
        """Draw, and yield how many steps are done, each time one is, and at last the picture."""
        steps: asyncio.Queue[int | None] = asyncio.Queue()
        drawing = asyncio.create_task(self._painter.draw(request, steps.put_nowait))
        drawing.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (done := await steps.get()) is not None:
                yield done
            yield drawing.result()
        finally:
            drawing.cancel()

    def _count(self, pictures: int) -> None:
        self._pictures.inc(pictures)
        self._batches.inc()


def _door(limits: Limits, digest: bytes | None, hosts: frozenset[str] | None, hint: str | None) -> Callable:
    """The builder of the HTTP application, which Serve runs in the replica that answers HTTP."""

    def build():
        painter = serve.get_deployment_handle(_PAINTER, app_name=_APPLICATION)

        async def draw(request: PictureRequest, report: Report | None) -> Drawn:
            for _ in range(_TRIES):
                # Steps cost messages, which only those pay for who want to hear of them.
                response = painter.draw.remote(request) if report is None else _watch(painter, request)
                try:
                    return await (response if report is None else _last(response, report))
                except RayActorError:
                    continue  # Its replica died. Another draws the same picture from the same seed.
                except asyncio.CancelledError:
                    response.cancel()  # Serve does so when a client leaves, but not when time is up.
                    raise
            raise NoWorker(f"the worker died {_TRIES} times over this request")

        return make_app(draw, _painter_count(), _ray_metrics, limits, digest=digest, hosts=hosts, hint=hint)

    return build


def _watch(painter, request: PictureRequest):
    return painter.options(stream=True).watch.remote(request)


async def _last(response, report: Report) -> Drawn:
    async for item in response:
        if isinstance(item, Drawn):
            return item
        report(item)
    raise NoWorker("the worker left its work")


def _painter_count() -> Callable:
    """A function that counts running painters, and asks Serve once a second however often it is called."""
    asking, known, until = asyncio.Lock(), 0, 0.0

    async def count() -> int:
        nonlocal known, until
        async with asking:
            if time.monotonic() >= until:
                application = (await asyncio.to_thread(serve.status)).applications[_APPLICATION]
                known = application.deployments[_PAINTER].replica_states.get(_RUNNING, 0)
                until = time.monotonic() + 1
        return known

    return count


async def _ray_metrics() -> bytes:
    """What Ray exports on the node that answers, Serve's own numbers among it."""

    def fetch() -> bytes:
        here = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == here)
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read()

    return await asyncio.to_thread(fetch)


def run_server(
    choice: ModelChoice,
    replicas: int,
    reserved: dict,
    limits: Limits,
    *,
    max_batch: int,
    host: str,
    port: int,
    digest: bytes | None,
    hint: str | None = None,
    shared: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM; Ray must be running.

    Args:
        choice: what each replica loads.
        replicas: workers that draw.
        reserved: Ray resources of each.
        limits: what is accepted.
        max_batch: pictures of the model's own size drawn together.
        host, port: where to listen.
        digest: of the API key, or None.
        hint: what the page says about the model.
        shared: the cluster goes on without us, and Serve has to be taken off it. A cluster of our own ends as a whole,
            which is quicker, and Ray then complains of nothing.

    Raises:
        UsageError: Serve already runs on the cluster, or the model does not load.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if serve.status().proxies:
        # It would keep its own host and port, which may be open to others than this server was made for.
        raise UsageError("--address: Ray Serve already runs on that cluster; stop it with 'serve shutdown'")
    hosts = frozenset({"localhost", "127.0.0.1", "[::1]", host}) if is_loopback(host) else None
    painter = serve.deployment(
        _Painter,
        name=_PAINTER,
        num_replicas=replicas,
        ray_actor_options=reserved,
        max_ongoing_requests=2 * max_batch,  # one batch runs while the next one gathers
        max_constructor_retry_count=2,
        **_STOPPING,
    )
    # The door refuses what is too much by itself, so Serve need not hold anything back.
    door = serve.deployment(
        serve.ingress(_door(limits, digest, hosts, hint))(),
        name=_DOOR,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,
        **_STOPPING,
    )
    stop = threading.Event()
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    try:
        serve.run(door.bind(painter.bind(choice, max_batch)), name=_APPLICATION, route_prefix="/")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"serving on http://{host}:{port} with {replicas} worker(s); stop with Ctrl-C", flush=True)
        # In slices: a signal that reaches another thread of Ray's would not wake this one.
        while not stop.wait(_SLICE):
            pass
    except RuntimeError as error:
        reason = serve.status().applications[_APPLICATION].deployments[_PAINTER].message or str(error)
        raise UsageError(f"the workers do not start: {reason.strip().splitlines()[-1]}") from error
    finally:
        if shared:
            serve.shutdown()
