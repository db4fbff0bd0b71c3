"""The stub server, reached in every way."""

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
from mcp import Client

from runtime.tools.mcp import connection
from runtime.tools.mcp.settings import McpSettings
from tests.runtime.tools.mcp.servers import HttpStub, stub


@pytest.fixture
async def http_stub() -> AsyncIterator[HttpStub]:
    server = HttpStub()
    await server.start()
    yield server
    await server.kill()


@pytest.fixture(params=["stdio", "http", "http-session"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A way to reach the stub. `http-session` is HTTP as before 2026: with a handshake and a session."""
    if request.param == "http-session":
        monkeypatch.setattr(connection, "Client", functools.partial(Client, mode="legacy"))
    return str(request.param)


@pytest.fixture
async def settings(transport: str) -> AsyncIterator[Callable[..., McpSettings]]:
    """Make settings for the stub, which runs meanwhile if it is an HTTP server."""
    async with AsyncExitStack() as stack:
        if transport == "stdio":
            yield stub
        else:
            server = HttpStub()
            await server.start()
            stack.push_async_callback(server.kill)
            yield server.settings
