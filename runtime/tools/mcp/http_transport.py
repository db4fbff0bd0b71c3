"""An MCP server that talks streamable HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
from mcp import types
from mcp.client.streamable_http import streamable_http_client

from runtime.tools.mcp.errors import reason
from runtime.tools.mcp.settings import McpSettings
from runtime.tools.mcp.transport import MESSAGE_MAX_BYTES, Transport
from runtime.tools.tool import ToolError


class HttpTransport(Transport):
    """Streamable HTTP. An error of one exchange fails that exchange only, and marks the connection as lost."""

    def __init__(self, settings: McpSettings) -> None:
        super().__init__()
        self._settings = settings
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> tuple[Any, Any]:
        settings = self._settings
        assert settings.url is not None
        headers = {"Accept-Encoding": "identity"}
        if settings.token_file is not None:
            token = await asyncio.to_thread(_token, settings.token_file)
            headers["Authorization"] = f"Bearer {token}"
        # Calls have limits of their own. This one ends exchanges that a server leaves open after their call is over.
        read_s = settings.timeout_s + settings.start_timeout_s + 60
        client = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(None, connect=settings.start_timeout_s, read=read_s),
            transport=_Exchanges(self),
        )
        async with self._stack:
            await self._stack.enter_async_context(client)
            streams = await self._stack.enter_async_context(
                streamable_http_client(settings.url, http_client=client, max_sse_event_size=MESSAGE_MAX_BYTES)
            )
            self._stack = self._stack.pop_all()
        return streams

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.__aexit__(*exc)

    def advice(self) -> str:
        where = str(self._settings.url).partition("?")[0]
        return f"Check that a server runs at `url` ({where}), and `token_file` if it wants a token."


class _Exchanges(httpx2.AsyncBaseTransport):
    """The HTTP exchanges of one connection.

    A POST that fails below HTTP, or with a status but no JSON, is answered with a JSON-RPC error. The client would
    otherwise end the whole session for the former, and hide the status of the latter.
    """

    def __init__(self, connection: Transport) -> None:
        self._connection = connection
        self._inner = httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_connections=None))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            response = await self._inner.handle_async_request(request)
        except httpx2.TransportError as error:
            if request.method != "POST":
                raise
            self._connection.lose(reason(error))
            return _failed(request, 503, reason(error))
        if request.method == "POST" and response.status_code >= 400:
            if response.status_code == 404 and "mcp-session-id" in request.headers:
                self._connection.lose("the server has ended the session")
            if not response.headers.get("content-type", "").lower().startswith("application/json"):
                await response.aclose()
                return _failed(request, response.status_code, f"HTTP status {response.status_code}")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Body(response, self._connection if request.method == "POST" else None)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Body(httpx2.AsyncByteStream):
    """A response's body. JSON is bounded; the client bounds events itself."""

    def __init__(self, response: httpx2.Response, connection: Transport | None) -> None:
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self._inner = response.stream
        self._connection = connection
        self._bounded = not response.headers.get("content-type", "").lower().startswith("text/event-stream")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size_bytes = 0
        try:
            async for chunk in self._inner:
                size_bytes += len(chunk)
                if self._bounded and size_bytes > MESSAGE_MAX_BYTES:
                    raise httpx2.StreamError(f"the answer has more than {MESSAGE_MAX_BYTES} bytes")
                yield chunk
        except httpx2.TransportError as error:
            if self._connection is not None:
                self._connection.lose(reason(error))
            raise httpx2.StreamError(reason(error)) from error  # which fails this exchange and not the session

    async def aclose(self) -> None:
        await self._inner.aclose()


def _failed(request: httpx2.Request, status: int, reason: str) -> httpx2.Response:
    error = {"code": types.INTERNAL_ERROR, "message": reason}
    return httpx2.Response(status, json={"jsonrpc": "2.0", "id": None, "error": error}, request=request)


def _token(file: str) -> str:
    try:
        token = Path(file).expanduser().read_text().strip()
    except (OSError, ValueError) as error:
        raise ToolError(f"`token_file` {file} cannot be read: {error}") from None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ToolError(f"`token_file` {file} must hold one token and nothing else")
    return token
