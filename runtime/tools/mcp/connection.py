"""One session with an MCP server: from the handshake, over calls that overlap, to its end."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, NoReturn, TypeVar

from mcp import Client, ClientSession, MCPError, types

from runtime.tools.mcp.errors import reason
from runtime.tools.mcp.http_transport import HttpTransport
from runtime.tools.mcp.settings import McpSettings
from runtime.tools.mcp.stdio_transport import StdioTransport
from runtime.tools.mcp.transport import Transport
from runtime.tools.tool import ToolError

PROBE_S = 5.0
"""The time that a server has to list its tools again, if it left a call unanswered or was silent for long."""

HTTP_SILENCE_S = 30.0
"""An HTTP server that has answered nothing for this long is probed before the next call. It may have been restarted."""

CLOSE_S = 8.0
"""The time that a session has to end by itself. A process needs up to 4 s."""

PAGES_MAX = 100

T = TypeVar("T")

_CLIENT = types.Implementation(name="troupe", version="1")


class Connection:
    """One session with a server. A task owns it, because the client must be entered and left in the same task."""

    def __init__(self, name: str, settings: McpSettings) -> None:
        self.tools: dict[str, types.Tool] = {}
        self._name = name
        self._settings = settings
        self._transport: Transport = StdioTransport(name, settings) if settings.command else HttpTransport(settings)
        self._session: ClientSession | None = None
        self._closing = asyncio.Event()
        self._opened: asyncio.Future[dict[str, types.Tool]] = asyncio.get_running_loop().create_future()
        self._calls: set[asyncio.Task[Any]] = set()
        self._heard_s = 0.0
        self._unanswered_s = 0.0

    @property
    def lost(self) -> str | None:
        """Return why no call can be made any more, or None."""
        return self._transport.lost

    @property
    def doubtful(self) -> bool:
        """True if the connection is lost, left the last call unanswered, or was silent for long and uses HTTP."""
        silent_s = asyncio.get_running_loop().time() - self._heard_s
        old = self._settings.url is not None and silent_s > HTTP_SILENCE_S
        return self.lost is not None or self._unanswered_s > self._heard_s or old

    async def open(self, timeout_s: float) -> None:
        """Start the session and list the tools. Raise ToolError if that fails or takes longer; nothing stays behind."""
        self._task = asyncio.create_task(self._own(), name=f"mcp-{self._name}")
        try:
            await asyncio.wait({self._opened}, timeout=timeout_s)
            if not self._opened.done():
                await self.close()
                self._refuse(f"it did not answer within {timeout_s:.3g} s (`start_timeout_s`)")
            self.tools = self._opened.result()
        except BaseException:
            await self.close()
            raise
        self._heard()

    async def answers(self) -> bool:
        """Return True if the server still answers."""
        if self.lost is not None or self._session is None:
            return False
        try:
            await self._ask("list", self._session.list_tools(), PROBE_S)
        except MCPError:
            return self.lost is None
        except Exception:  # noqa: BLE001  the client raises many types for an invalid answer
            return False
        return self.lost is None

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> types.CallToolResult:
        """Send a call and return its result. Raise ToolError if there is none in time. The call is not repeated."""
        assert self._session is not None
        timeout_s = self._settings.timeout_s
        try:
            return await self._ask(tool, self._session.call_tool(tool, dict(arguments)), timeout_s)
        except TimeoutError:
            raise ToolError(
                f"The tool {tool} of the MCP server {self._name} did not answer within {timeout_s:.3g} s."
            ) from None
        except Exception as error:  # the client raises many types for an invalid answer
            if self.lost is not None:
                lost = f"The connection to the MCP server {self._name} was lost during the call: {self.lost}."
                raise ToolError(f"{lost} The tool {tool} may or may not have done its work.") from error
            if isinstance(error, MCPError):
                raise ToolError(f"The MCP server {self._name} refused the call of {tool}: {reason(error)}") from error
            raise ToolError(
                f"The MCP server {self._name} gave an invalid answer to the call of {tool}: {reason(error)}"
            ) from error

    async def close_when_idle(self) -> None:
        """Wait for the calls under way, which end within their time, and close."""
        if self._calls:
            await asyncio.wait(self._calls)
        await self.close()

    async def close(self) -> None:
        """End the session and the server's process. The calls under way fail. Does nothing the second time."""
        self._transport.lose("it was closed")
        self._closing.set()
        if self._session is None:
            self._opened.cancel()
            self._task.cancel()
        try:
            await asyncio.wait({self._task}, timeout=CLOSE_S)
        finally:
            self._task.cancel()
        await asyncio.wait({self._task, *self._calls})

    async def _own(self) -> None:
        """Run the session. Only this task enters and leaves the client."""
        try:
            async with Client(self._transport, cache=None, client_info=_CLIENT) as client:
                tools = await _list_tools(client.session)
                self._session = client.session
                self._opened.set_result(tools)
                await self._closing.wait()
        except Exception as error:  # noqa: BLE001  the client raises many types, groups too
            self._transport.lose(reason(error))
        self._transport.lose("it was closed")
        if not self._opened.done():
            try:
                self._refuse(str(self.lost))
            except ToolError as refusal:
                self._opened.set_exception(refusal)

    def _refuse(self, why: str) -> NoReturn:
        raise ToolError(f"The MCP server {self._name} cannot be used: {why}. {self._transport.advice()}")

    async def _ask(self, what: str, request: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Await a request in a task of its own. If the caller leaves or the time is over, cancel it at the server.

        Raise TimeoutError if the time is over. The cancellation is sent in the background, which takes a few seconds
        if the server reads nothing.
        """
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(request, name=f"mcp-{self._name}-{what}")
        self._calls.add(task)
        task.add_done_callback(self._ended)
        sent_s = loop.time()
        try:
            await asyncio.wait({task}, timeout=timeout_s)
            if not task.done():
                self._unanswered_s = max(self._unanswered_s, sent_s)
                raise TimeoutError
            if self.lost is None:
                self._heard()
            return task.result()
        finally:
            task.cancel()

    def _heard(self) -> None:
        self._heard_s = asyncio.get_running_loop().time()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # asyncio must not log it if the caller has left


async def _list_tools(session: ClientSession) -> dict[str, types.Tool]:
    """Return the server's tools by name, from all pages."""
    tools: dict[str, types.Tool] = {}
    cursor: str | None = None
    for _ in range(PAGES_MAX):
        page = await session.list_tools(params=types.PaginatedRequestParams(cursor=cursor))
        tools.update((tool.name, tool) for tool in page.tools)
        cursor = page.next_cursor
        if cursor is None:
            return tools
    raise ToolError(f"its list of tools has more than {PAGES_MAX} pages")
