"""The HTTP interface: a FastAPI application over whatever draws pictures."""

import asyncio
import base64
import html
import math
import secrets
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any, Literal

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field, field_validator

from .. import __version__
from ..limits import MAX_GUIDANCE, MAX_PROMPT
from .gate import Gate
from .requests import PictureRequest, message, parse_size
from .waiting import Draw, Drawn, Limits, WaitingRoom, events

# This module has no `from __future__ import annotations`: FastAPI needs the request model, which is made per
# server, as a class and not as a name.

_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SHOWN = 80


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


class Event(BaseModel):
    """What is told of a picture while it is drawn: JSON of `{"done": 3, "steps": 20}`, a picture, or a refusal."""

    event: Literal["step", "picture", "error"]
    data: str


class Health(BaseModel):
    """Whether pictures can be drawn now."""

    status: Literal["ok", "no worker"]
    workers: int
    requests: int = Field(description="accepted and not yet answered")


def request_model(limits: Limits) -> type[PictureRequest]:
    """The body of `POST /generate` under a server's limits."""

    class GenerateRequest(PictureRequest):
        steps: int = Field(min(20, limits.steps), ge=1, le=limits.steps, description="denoising steps")
        output: Literal["png", "json", "events"] = Field(
            "png", description="the picture alone, base64 within JSON, or server-sent events: steps, then the JSON"
        )

        @field_validator("size")
        @classmethod
        def _size_is_allowed(cls, size: str | None) -> str | None:
            if size is not None and math.prod(parse_size(size)) > limits.pixels:
                raise ValueError(f"width times height must be {limits.pixels} or less")
            return size

    return GenerateRequest


def make_app(
    draw: Draw,
    count_workers: Callable[[], Awaitable[int]],
    metrics: Callable[[], Awaitable[bytes]],
    limits: Limits,
    *,
    digest: bytes | None = None,
    hosts: frozenset[str] | None = None,
    hint: str | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        draw: what draws.
        count_workers: how many workers are ready.
        metrics: the text of `/metrics`.
        limits: what is accepted.
        digest, hosts: as in `Gate`.
        hint: what the page says about the model.
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
    refusals: dict[int | str, dict[str, Any]] = {status: {"model": Refusal} for status in (400, 408, 413, 415)}
    key = []
    if digest is not None:  # Gate checks the key; these are for the description.
        key = [Security(HTTPBearer(auto_error=False))]
        refusals[401] = {"model": Refusal}
    room = WaitingRoom(draw, limits)
    page = _page(limits, hint)

    async def generate(body: request_model(limits)) -> Response:  # type: ignore[valid-type]  # made for this server
        seed = secrets.randbits(32) if body.seed is None else body.seed
        request = PictureRequest(**{**body.model_dump(exclude={"output"}), "seed": seed})
        if body.output == "events":
            done: asyncio.Queue[int | None] = asyncio.Queue()
            task = room.admit(request, done.put_nowait)
            told = events(task, done, lambda drawn: _picture(request, drawn), request.steps)
            return StreamingResponse(told, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        drawn = await room.admit(request)
        if body.output == "png":
            headers = {"X-Seed": str(seed), "X-Size": drawn.size, "X-Seconds": f"{drawn.seconds:.3f}"}
            return Response(drawn.png, media_type="image/png", headers=headers)
        return JSONResponse(_picture(request, drawn))

    app.post(
        "/generate",
        summary="Draw a picture",
        dependencies=key,
        response_class=Response,
        responses={
            200: {
                "model": Picture,
                "description": "PNG with X-Seed, X-Size and X-Seconds, or JSON, or events of steps and then the JSON",
                "content": {
                    "image/png": {"schema": {"type": "string", "format": "binary"}},
                    "text/event-stream": {"schema": Event.model_json_schema()},
                },
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
        return Health(status="ok" if workers else "no worker", workers=workers, requests=room.count)

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


def _picture(request: PictureRequest, drawn: Drawn) -> dict:
    return Picture(
        image=base64.b64encode(drawn.png).decode(),
        seed=request.seed or 0,
        size=drawn.size,
        steps=request.steps,
        guidance=request.guidance,
        seconds=drawn.seconds,
    ).model_dump()


def _page(limits: Limits, hint: str | None) -> str:
    text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    values: dict[str, object] = {"STEPS": limits.steps, "DEFAULT": min(20, limits.steps), "PIXELS": limits.pixels}
    values |= {"PROMPT": MAX_PROMPT, "GUIDANCE": MAX_GUIDANCE, "HINT": html.escape(hint or "")}
    for name, value in values.items():
        text = text.replace(f"{{{{{name}}}}}", str(value))
    return text


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
