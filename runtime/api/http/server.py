"""The web server: owns the listening socket and its connections, and bounds what a connection costs before a request.

The headers of a request are read before its host name, rate and token are checked. Without bounds, anybody could fill
the memory with headers, or hold all `connections_max` connections open by sending nothing.
"""

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from runtime.config import Service
from runtime.errors import TroupeError

SHUTDOWN_GRACE_S = 3
"""Seconds that open connections get to finish when the service shuts down."""
HEADERS_MAX_BYTES = 64 << 10
"""The most bytes of a request apart from its body. The bytes that were read together with the last ones come on top."""
HEADERS_S = 10.0
"""Seconds within which headers must be complete, from the start of the connection or from their first byte."""


@asynccontextmanager
async def listening(app: FastAPI, service: Service) -> AsyncIterator[str]:
    """Serve the application on the configured address; yield its URL. Raises TroupeError if it cannot listen."""
    bound = _bind(service)
    host, port = bound.getsockname()[:2]
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            limit_concurrency=service.connections_max,
            timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
            http=_Connection,
            server_header=False,
            # uvicorn trusts X-Forwarded-For from localhost by default. A local client could then evade the rate limit
            # by sending a new address with every request.
            forwarded_allow_ips=os.environ.get("FORWARDED_ALLOW_IPS", ""),
            ws="none",
        )
    )
    task = asyncio.create_task(server.serve(sockets=[bound]), name="http")
    try:
        while not server.started and not task.done():  # noqa: ASYNC110  uvicorn has no event for this
            await asyncio.sleep(0.005)
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        server.should_exit = True
        await asyncio.wait([task])
        bound.close()


def _bind(service: Service) -> socket.socket:
    family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((service.host, service.port))
    except OSError as error:
        bound.close()
        remedy = "; choose another port with --port" if error.errno == errno.EADDRINUSE else ""
        address = f"{service.host}:{service.port}"
        raise TroupeError(f"service.port: cannot listen on {address}: {error.strerror}{remedy}") from None
    bound.setblocking(False)
    return bound


class _Server(uvicorn.Server):
    """A uvicorn server that installs no signal handlers, because the `serve` command handles signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Connection(HttpToolsProtocol):
    """A connection that is closed if its headers take too long or are too large. uvicorn bounds neither.

    uvicorn itself closes a connection that sends nothing for some seconds after a response.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's is the same
        super().connection_made(transport)
        self._header_bytes = 0
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._timer.cancelled() and not self._responds:
            self._start_timer()
        self._header_bytes += len(data)
        super().data_received(data)
        if self._header_bytes > HEADERS_MAX_BYTES and not self.transport.is_closing():
            self._refuse_headers()

    def on_headers_complete(self) -> None:
        self._timer.cancel()
        self._header_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._header_bytes = 0  # what follows the body counts: trailers are headers too
        super().on_body(body)

    @property
    def _responds(self) -> bool:
        """True while a request is being answered."""
        return bool(self.cycle) and not self.cycle.response_complete  # uvicorn's type omits that it may be None

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEADERS_S, self.transport.close)

    def _refuse_headers(self) -> None:
        if self._responds:
            self.transport.close()
        else:
            self.send_400_response(f"The headers are too large: at most {HEADERS_MAX_BYTES} bytes are allowed.")
