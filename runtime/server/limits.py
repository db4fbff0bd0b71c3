"""What a request may be: from a host that is ours to answer for, not too large, not too often."""

import asyncio
from collections import OrderedDict

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.errors import TooMuch, error_body

CLIENTS = 10_000
"""Clients whose rate is remembered."""
LOCAL = ("localhost", "127.0.0.1", "::1")


class Limits:
    """An ASGI application before another. Bodies of at most `body_bytes`; `per_s` requests a second of a client (a
    token, or an address); where `hosts` are given, only under one of these names, so that no page of elsewhere can have
    a browser here talk to us under a name of its own."""

    def __init__(
        self, app: ASGIApp, body_bytes: int, per_s: float | None = None, hosts: tuple[str, ...] | None = None
    ) -> None:
        self._app = app
        self._body_bytes = body_bytes
        self._per_s = per_s
        self._hosts = hosts
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if refusal := self._refusal(scope, headers):
            body = error_body(refusal)
            retry = {"Retry-After": "1"} if refusal.status == 429 else {}
            await JSONResponse(body, refusal.status, retry)(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _refusal(self, scope: Scope, headers: Headers) -> TooMuch | None:
        host = _name(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            return TooMuch(f"this service answers under the names {', '.join(self._hosts)}; not as {host[:100]!r}", 400)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._body_bytes:
            return self._too_large()
        client = headers.get("authorization") or (scope.get("client") or ("",))[0]
        if self._per_s is not None and not self._may(client):
            return TooMuch(f"more than {self._per_s:g} requests a second", 429)
        return None

    def _may(self, client: str) -> bool:
        """Take one from the client's bucket, which fills by `per_s` to at most one second's worth."""
        assert self._per_s is not None
        now = asyncio.get_running_loop().time()
        most = max(self._per_s, 1.0)
        left, at = self._buckets.pop(client, (most, now))
        left = min(most, left + (now - at) * self._per_s)
        allowed = left >= 1
        self._buckets[client] = (left - allowed, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return allowed

    def _counted(self, receive: Receive) -> Receive:
        """A body that does not say how long it is is counted as it comes."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._body_bytes:
                raise HTTPException(413, str(self._too_large()))
            return message

        return counted

    def _too_large(self) -> TooMuch:
        return TooMuch(f"the body is too large: at most {self._body_bytes} bytes are taken", 413)


def _name(host: str) -> str:
    """A host without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
