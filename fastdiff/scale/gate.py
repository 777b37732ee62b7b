"""What every HTTP request passes before it is read: the host's name, the API key and the size of the body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re

from starlette.responses import JSONResponse

MAX_BODY = 64 * 1024  # bytes; a request is two prompts and a few numbers
_BODY_SECONDS = 10.0
_JSON = re.compile(rb"application/(\w[\w.+-]*\+)?json\s*(;|$)", re.IGNORECASE)
_OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})


def key_digest(key: str) -> bytes:
    """SHA-256 of an API key: what servers keep and compare, so that the key itself is stored nowhere."""
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()


class Gate:
    """ASGI middleware; answers 400, 401, 408, 413 and 415 itself.

    Args:
        app: what requests go on to.
        digest: of the API key that all but the page, `/health` and the description need; None for no key.
        hosts: values of the Host header to answer; None for any. A server on a loopback address names its
            own, so that a foreign web page cannot reach it through a host name that resolves there.
        body_seconds: for a whole body to come in.
    """

    def __init__(
        self, app, digest: bytes | None, hosts: frozenset[str] | None, body_seconds: float = _BODY_SECONDS
    ):
        self._app, self._digest, self._hosts, self._body_seconds = app, digest, hosts, body_seconds

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal: JSONResponse | None
        if self._hosts is not None and _host_name(headers) not in self._hosts:
            refusal = _refuse(400, f"unknown Host; this server answers to {', '.join(sorted(self._hosts))}")
        elif scope["path"] not in _OPEN_PATHS and not self._has_key(headers):
            detail = "send the API key as 'Authorization: Bearer KEY'"
            refusal = _refuse(401, detail, {"WWW-Authenticate": "Bearer"})
        elif scope["method"] == "POST" and not _JSON.match(headers.get(b"content-type", b"")):
            refusal = _refuse(415, "the body is JSON: send it with the header 'Content-Type: application/json'")
        else:
            try:
                body, refusal = await asyncio.wait_for(_read_body(headers, receive), self._body_seconds)
            except asyncio.TimeoutError:  # noqa: UP041 - another class than TimeoutError before Python 3.11
                refusal = _refuse(408, f"the body did not come within {self._body_seconds:g} s")
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay():
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        if self._digest is None:
            return True
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key_digest(key.strip()), self._digest)


def _host_name(headers: dict[bytes, bytes]) -> str:
    host = headers.get(b"host", b"").decode("latin-1").lower()
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]


async def _read_body(headers: dict[bytes, bytes], receive) -> tuple[bytes, JSONResponse | None]:
    too_large = _refuse(413, f"the body is larger than {MAX_BODY} bytes")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length[:12]) > MAX_BODY:
        return b"", too_large
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"", _refuse(400, "the connection ended within the body")
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > MAX_BODY:
            return b"", too_large
    return body, None


def _refuse(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)
