"""Refuses requests before any route sees them: for another host, from another site's page, too large, or too many."""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.api.http.auth import Gate, secret_of
from runtime.api.http.errors import Refused, error_body

CLIENTS = 10_000
"""Clients whose rate is remembered; the one that has been silent longest is forgotten first.

Forgetting a client resets its limit, and takes requests from 10,000 other clients.
"""


SAFE = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing."""


class Limits:
    """An ASGI application before another.

    Bodies have at most `body_bytes`. A client makes at most `per_s` requests a second: a client is a token that `gate`
    knows, or else an address (for IPv6 its first 64 bits), so that made-up tokens are all one client. If `hosts` are
    given, the service answers under these names alone, so that no page of another site can reach it under a name of
    its own. Such a page changes nothing under ours either. `clock` returns seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        body_bytes: int,
        gate: Gate,
        per_s: float | None = None,
        hosts: tuple[str, ...] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._body_bytes = body_bytes
        self._gate = gate
        self._per_s = per_s
        self._hosts = hosts
        self._clock = clock
        self._buckets: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()

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

    def _refusal(self, scope: Scope, headers: Headers) -> Refused | None:
        host = _name(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            return Refused(f"this service answers under the names {', '.join(self._hosts)}; not as {host[:100]!r}", 400)
        if scope["method"] not in SAFE and not _of_this_site(headers):
            return Refused(
                "the request comes from a page of another site; only this service's own page may change anything", 403
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._body_bytes:
            return self._too_large()
        if self._per_s is not None and not self._may(self._client(scope, headers)):
            return Refused(f"more than {self._per_s:g} requests a second", 429)
        return None

    def _client(self, scope: Scope, headers: Headers) -> tuple[str, str]:
        """Return the token's name if the gate knows it, else the network address."""
        if name := self._gate.name(secret_of(headers)):
            return "token", name
        host, _ = scope.get("client") or ("", 0)
        return "address", _network(host)

    def _may(self, client: tuple[str, str]) -> bool:
        """Take one from the client's bucket, which fills by `per_s` to at most one second's worth."""
        assert self._per_s is not None
        now = self._clock()
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

    def _too_large(self) -> Refused:
        return Refused(f"the body is too large: at most {self._body_bytes} bytes are taken", 413)


def _of_this_site(headers: Headers) -> bool:
    """Return True unless a browser says that the request comes from a page of another origin.

    Browsers send Sec-Fetch-Site to https and localhost, and Origin with every request to another origin that is not
    safe; other clients send neither. This is the rule of Go's net/http.CrossOriginProtection.
    """
    if site := headers.get("sec-fetch-site"):
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or origin.lower().partition("://")[1:] == ("://", headers.get("host", "").lower())


def _name(host: str) -> str:
    """A host without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _network(host: str) -> str:
    """Return what one client holds of an address: all of an IPv4 address, the first 64 bits of an IPv6 one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a socket's path, or nothing
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address) >> 64 << 64))
    return str(address)
