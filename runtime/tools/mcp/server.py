"""An MCP server that stays reachable: it gets a new connection when the last one is lost."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from agents.tool import ToolSpec
from runtime.tools.bounded_output import cut
from runtime.tools.mcp.connection import Connection
from runtime.tools.mcp.content import text_of
from runtime.tools.mcp.offer import offer
from runtime.tools.mcp.settings import SERVER_NAME, McpSettings
from runtime.tools.tool import Tool, ToolError

CONNECT_TRIES = 3
"""The number of times that one call tries to open a connection."""

BACKOFF_S = 0.25
BACKOFF_MAX_S = 8.0
"""The delay before a start, after the second failure in a row; it doubles with each one, up to the maximum."""

logger = logging.getLogger(__name__)


class McpServer:
    """An async context manager that owns an MCP server, or a connection to one, and gives its tools.

    Entering it returns the tools. They can be called until it is left, from any number of tasks. Leaving it ends the
    server's process and all its descendants, or the HTTP session. No two tools of one server have the same name.
    """

    def __init__(self, name: str, settings: McpSettings) -> None:
        if not SERVER_NAME.fullmatch(name):
            raise ValueError(f"the name of an MCP server must match {SERVER_NAME.pattern}, unlike {name!r}")
        self.name = name
        self._settings = settings
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[Connection] | None = None
        self._retired: dict[asyncio.Task[None], Connection] = {}
        self._failures = 0
        self._next_start_s = 0.0
        self._running = False

    async def __aenter__(self) -> tuple[Tool, ...]:
        """Start the server or connect to it, and return its tools.

        Raise ToolError if it cannot be reached, does not speak MCP, or its tools cannot be used.
        """
        connection = Connection(self.name, self._settings)
        await connection.open(self._settings.start_timeout_s)
        try:
            specs = offer(self.name, self._settings, connection.tools)
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        self._running = True
        return tuple(McpTool(self, remote_name, spec) for remote_name, spec in specs.items())

    async def __aexit__(self, *exc: object) -> None:
        self._running = False
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        if self._connection is not None:
            self._retire(self._connection)
        await asyncio.gather(*(connection.close() for connection in self._retired.values()))
        await asyncio.gather(*self._retired)

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """Call a tool by the server's name for it, and return its output as text. `McpTool` calls this."""
        connection = await self._connected()
        if tool not in connection.tools:
            raise ToolError(f"The MCP server {self.name} no longer has the tool {tool}.")
        result = await connection.call(tool, arguments)
        self._failures = 0
        text = cut(text_of(result), self._settings.output_max_bytes)
        if result.is_error:
            raise ToolError(text or f"The tool {tool} failed and gave no reason.")
        return text

    async def _connected(self) -> Connection:
        """Return a connection that can be used. Callers share one attempt to open it, and may leave it."""
        if not self._running:
            raise ToolError(f"The MCP server {self.name} is stopped.")
        if self._connection is not None and not self._connection.doubtful:
            return self._connection
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect(), name=f"mcp-{self.name}-connect")
            self._connecting.add_done_callback(self._connect_ended)
        attempt = self._connecting
        await asyncio.wait({attempt})
        if attempt.cancelled():
            raise ToolError(f"The MCP server {self.name} is stopped.")
        if (error := attempt.exception()) is not None:
            raise ToolError(str(error)) from error
        return attempt.result()

    def _connect_ended(self, attempt: asyncio.Task[Connection]) -> None:
        self._connecting = None
        if not attempt.cancelled():
            attempt.exception()  # asyncio must not log it if all callers have left

    async def _connect(self) -> Connection:
        """Return the present connection if it answers, else open a new one: at once, then with growing delays."""
        if self._connection is not None:
            if await self._connection.answers():
                return self._connection
            logger.info("MCP server %s: the connection is lost: %s", self.name, self._connection.lost)
            self._retire(self._connection)
            self._connection = None
            self._note_failure()
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._settings.start_timeout_s
        failure: ToolError | None = None
        for _ in range(CONNECT_TRIES):
            delay_s = self._next_start_s - loop.time()
            if loop.time() + delay_s >= until_s:
                break
            await asyncio.sleep(delay_s)
            connection = Connection(self.name, self._settings)
            try:
                await connection.open(until_s - loop.time())
            except ToolError as error:
                failure = error
                self._note_failure()
            else:
                self._connection = connection
                return connection
        raise failure or ToolError(f"The MCP server {self.name} keeps failing; try again later.")

    def _note_failure(self) -> None:
        self._failures += 1
        delay_s = min(BACKOFF_MAX_S, BACKOFF_S * 2 ** min(self._failures - 2, 16)) if self._failures > 1 else 0.0
        self._next_start_s = asyncio.get_running_loop().time() + delay_s

    def _retire(self, connection: Connection) -> None:
        """Close a connection in the background, after the calls that are under way on it."""
        task = asyncio.create_task(connection.close_when_idle(), name=f"mcp-{self.name}-close")
        self._retired[task] = connection
        task.add_done_callback(self._retired.pop)


class McpTool(Tool):
    """A tool of an MCP server. The server owns its lifetime."""

    def __init__(self, server: McpServer, remote_name: str, spec: ToolSpec) -> None:
        self.spec = spec
        self._remote_name = remote_name
        self._server = server

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """Call the tool. Takes at most `timeout_s`, and `start_timeout_s` in addition if the server must be started."""
        return await self._server.call(self._remote_name, arguments)
