"""Limits on requests, checked before any route: host name, cross-site changes, body size and request rate."""

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.api.auth import Gate
from runtime.api.http.auth import bearer_secret
from runtime.api.http.cross_site import is_cross_site_change
from runtime.api.http.errors import RequestBlocked, error_body

CLIENTS_MAX = 10_000
"""The number of clients whose rate is remembered; the one that has been silent longest is forgotten first.

Forgetting a client resets its limit. It takes requests from 10,000 other clients.
"""
BODY_S = 60.0
"""Seconds that a body may take to arrive. It is read before the token is checked."""


class Limits:
    """ASGI middleware that rejects requests before the application sees them.

    It rejects:

    - requests under another host name than `hosts`, if given, so that a site that points a name of its own at this
      service cannot reach it;
    - requests from pages of other sites that may change something;
    - bodies of more than `body_max_bytes` bytes, and those that take longer than BODY_S;
    - more than `per_s` requests a second from one client. A client is a token that `gate` knows, or else a network
      address (for IPv6 its first 64 bits). Requests with made-up tokens therefore count for their address.

    `clock` returns seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        body_max_bytes: int,
        gate: Gate,
        per_s: float | None = None,
        hosts: tuple[str, ...] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._body_max_bytes = body_max_bytes
        self._gate = gate
        self._per_s = per_s
        self._hosts = hosts
        self._clock = clock
        self._buckets: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        blocked = self._block(scope, Headers(scope=scope))
        if blocked is None:
            await self._app(scope, self._bounding(receive), send)
            return
        retry = {"Retry-After": "1"} if blocked.status == 429 else {}
        await JSONResponse(error_body(blocked), blocked.status, retry)(scope, receive, send)

    def _block(self, scope: Scope, headers: Headers) -> RequestBlocked | None:
        """Return why a request is blocked, or None if it may pass."""
        host = _without_port(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            names = ", ".join(self._hosts)
            return RequestBlocked(
                f"the host name {host[:100]!r} is not allowed; use one of {names}, or add it to `service.names`", 400
            )
        if is_cross_site_change(scope["method"], headers):
            return RequestBlocked(
                "the request comes from a page of another site; only this service's own page may change anything", 403
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._body_max_bytes:
            return self._too_large()
        if self._per_s is not None and not self._take(self._client(scope, headers), self._per_s):
            return RequestBlocked(
                f"too many requests: at most {self._per_s:g} a second are allowed; try again later", 429
            )
        return None

    def _client(self, scope: Scope, headers: Headers) -> tuple[str, str]:
        """Return the token's name if the gate knows it, else the network address."""
        if name := self._gate.token_name(bearer_secret(headers)):
            return "token", name
        host, _ = scope.get("client") or ("", 0)
        return "address", _network(host)

    def _take(self, client: tuple[str, str], per_s: float) -> bool:
        """Take a request from the client's bucket; return False if it is empty.

        A bucket fills at `per_s` requests a second and holds one second's worth, at least one request.
        """
        now_s = self._clock()
        capacity = max(per_s, 1.0)
        available, filled_at_s = self._buckets.pop(client, (capacity, now_s))
        available = min(capacity, available + (now_s - filled_at_s) * per_s)
        allowed = available >= 1
        self._buckets[client] = (available - allowed, now_s)
        if len(self._buckets) > CLIENTS_MAX:
            self._buckets.popitem(last=False)
        return allowed

    def _bounding(self, receive: Receive) -> Receive:
        """Return a `receive` that raises once the body is too large or too late: a chunked body announces no length."""
        received_bytes, is_complete = 0, False
        late_at_s = asyncio.get_running_loop().time() + BODY_S

        async def bounding() -> Message:
            nonlocal received_bytes, is_complete
            if is_complete:  # only a disconnect can follow
                return await receive()
            try:
                async with asyncio.timeout_at(late_at_s):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {BODY_S:g} s") from None
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._body_max_bytes:
                raise HTTPException(413, str(self._too_large()))
            is_complete = not message.get("more_body", False)
            return message

        return bounding

    def _too_large(self) -> RequestBlocked:
        return RequestBlocked(f"the body is too large: at most {self._body_max_bytes} bytes are allowed", 413)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _network(host: str) -> str:
    """Return the part of an address that one client holds: a whole IPv4 address, the first 64 bits of an IPv6 one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # the path of a Unix socket, or empty
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address) >> 64 << 64))
    return str(address)
