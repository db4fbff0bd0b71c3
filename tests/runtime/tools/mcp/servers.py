"""MCP servers as real processes, over standard streams and over HTTP."""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from runtime.tools.mcp.server import McpServer
from runtime.tools.mcp.settings import McpSettings
from runtime.tools.tool import Tool
from tests.runtime.tools.processes import until

ROOT = Path(__file__).resolve().parents[4]
STUB = str(ROOT / "tests/stubs/mcp_server.py")
RAW = str(ROOT / "tests/stubs/mcp_raw_server.py")

Call = Callable[..., Awaitable[str]]


def stub(**settings: Any) -> McpSettings:
    return McpSettings(command=sys.executable, args=(STUB,), **{"timeout_s": 60, "start_timeout_s": 60} | settings)


def raw(behaviour: str, folder: Path = ROOT, **settings: Any) -> McpSettings:
    arguments = (RAW, behaviour, str(folder))
    return McpSettings(command=sys.executable, args=arguments, **{"timeout_s": 60, "start_timeout_s": 60} | settings)


def caller(tools: Sequence[Tool]) -> Call:
    """Return a function that calls a tool of the server `s` by the server's name for it."""
    by_name = {tool.spec.name: tool for tool in tools}

    def call(name: str, **arguments: Any) -> Awaitable[str]:
        return by_name[f"s_{name}"].call(arguments)

    return call


@asynccontextmanager
async def running(settings: McpSettings) -> AsyncIterator[Call]:
    async with McpServer("s", settings) as tools:
        yield caller(tools)


def holds(file: Path, text: str) -> Callable[[], bool]:
    return lambda: file.exists() and text in file.read_text()


class HttpStub:
    """The stub as an HTTP server at one port, which can be killed and started again."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def settings(self, **settings: Any) -> McpSettings:
        url = f"http://127.0.0.1:{self.port}/mcp"
        return McpSettings(url=url, **{"timeout_s": 60, "start_timeout_s": 60} | settings)

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(sys.executable, STUB, "http", str(self.port))

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        await until(listens)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
