"""The HTTP interface: a FastAPI application over whatever draws pictures."""

import asyncio
import base64
import math
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field, field_validator

from .. import __version__
from .gate import Gate
from .requests import PictureRequest, message, parse_size

# This module has no `from __future__ import annotations`: FastAPI needs the request model, which is made per
# server, as a class and not as a name.

_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SHOWN = 80


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


class Refusal(BaseModel):
    """Why there is no picture."""

    detail: str


class Picture(BaseModel):
    """A picture as JSON."""

    image: str = Field(description="PNG, base64")
    seed: int
    size: str
    steps: int
    guidance: float
    seconds: float


class Health(BaseModel):
    """Whether pictures can be drawn now."""

    status: Literal["ok", "no worker"]
    workers: int
    requests: int = Field(description="accepted and not yet answered")


def request_model(limits: Limits) -> type[PictureRequest]:
    """The body of `POST /generate` under a server's limits."""

    class GenerateRequest(PictureRequest):
        steps: int = Field(min(20, limits.steps), ge=1, le=limits.steps, description="denoising steps")
        output: Literal["png", "json"] = Field("png", description="the picture alone, or base64 within JSON")

        @field_validator("size")
        @classmethod
        def _size_is_allowed(cls, size: str | None) -> str | None:
            if size is not None and math.prod(parse_size(size)) > limits.pixels:
                raise ValueError(f"width times height must be {limits.pixels} or less")
            return size

    return GenerateRequest


def make_app(
    draw: Callable[[PictureRequest], Awaitable[Drawn]],
    count_workers: Callable[[], Awaitable[int]],
    metrics: Callable[[], Awaitable[bytes]],
    limits: Limits,
    *,
    digest: bytes | None = None,
    hosts: frozenset[str] | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        draw: draws a request that has a seed; raises `NoWorker`. Cancelled when nobody waits any more.
        count_workers: how many workers are ready.
        metrics: the text of `/metrics`.
        limits: what is accepted.
        digest, hosts: as in `Gate`.
    """
    app = FastAPI(
        title="fastdiff",
        version=__version__,
        description="Pictures from prompts.",
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Gate, digest=digest, hosts=hosts)
    app.exception_handler(RequestValidationError)(_explain_invalid)
    refusals: dict[int | str, dict[str, Any]] = {status: {"model": Refusal} for status in (400, 408, 413)}
    key = []
    if digest is not None:  # Gate checks the key; these are for the description.
        key = [Security(HTTPBearer(auto_error=False))]
        refusals[401] = {"model": Refusal}
    # Only the event loop touches these.
    waiting, seconds = 0, 1.0
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    async def generate(body: request_model(limits)) -> Response:  # type: ignore[valid-type]  # made for this server
        nonlocal waiting, seconds
        if waiting >= limits.queue:
            # By the time a picture takes now, those that are waiting have been drawn.
            wait = str(min(60, max(1, math.ceil(seconds))))
            detail = f"{limits.queue} requests are waiting; try again in {wait} s"
            raise HTTPException(429, detail, {"Retry-After": wait})
        seed = secrets.randbits(32) if body.seed is None else body.seed
        request = PictureRequest(**{**body.model_dump(exclude={"output"}), "seed": seed})
        waiting += 1
        started = asyncio.get_running_loop().time()
        try:
            drawn = await asyncio.wait_for(draw(request), limits.timeout)
        except asyncio.TimeoutError as error:  # noqa: UP041 - another class than TimeoutError before Python 3.11
            raise HTTPException(504, f"not drawn within {limits.timeout:g} s") from error
        except NoWorker as error:
            raise HTTPException(503, str(error), {"Retry-After": "10"}) from error
        finally:
            waiting -= 1
            seconds += 0.2 * (asyncio.get_running_loop().time() - started - seconds)
        if body.output == "png":
            headers = {"X-Seed": str(seed), "X-Size": drawn.size, "X-Seconds": f"{drawn.seconds:.3f}"}
            return Response(drawn.png, media_type="image/png", headers=headers)
        picture = Picture(
            image=base64.b64encode(drawn.png).decode(),
            seed=seed,
            size=drawn.size,
            steps=request.steps,
            guidance=request.guidance,
            seconds=drawn.seconds,
        )
        return JSONResponse(picture.model_dump())

    app.post(
        "/generate",
        summary="Draw a picture",
        dependencies=key,
        response_class=Response,
        responses={
            200: {
                "model": Picture,
                "description": "PNG with X-Seed, X-Size and X-Seconds, or JSON",
                "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
            },
            **refusals,
            429: {"model": Refusal, "description": "too many requests are waiting; see Retry-After"},
            503: {"model": Refusal, "description": "no worker can draw it; see Retry-After"},
            504: {"model": Refusal, "description": "not drawn in time"},
        },
    )(generate)

    @app.get("/health", responses={**refusals, 503: {"model": Health}})
    async def health(response: Response) -> Health:
        workers = await count_workers()
        if not workers:
            response.status_code = 503
        return Health(status="ok" if workers else "no worker", workers=workers, requests=waiting)

    @app.get(
        "/metrics",
        summary="What Ray measures, for Prometheus",
        dependencies=key,
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refusals},
    )
    async def prometheus() -> Response:
        return Response(await metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    return app


async def _explain_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong without sending the input back: it may be large, or text that no JSON can hold."""
    findings = [
        {
            "loc": [_shown(part) for part in finding["loc"]],
            "msg": _shown(message(finding)),
            "type": finding["type"],
        }
        for finding in error.errors()[:20]
    ]
    return JSONResponse({"detail": findings}, 422)


def _shown(part: str | int) -> str | int:
    if isinstance(part, int):
        return part
    return part.encode("utf-8", "backslashreplace").decode()[: 4 * _SHOWN if " " in part else _SHOWN]
