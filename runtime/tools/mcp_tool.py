"""The tools of an MCP server, over the official client. This is the one module that imports `mcp`.

A call's way:

1. `McpServer` hands the call to its connection. It first opens a new one if the last one is lost or does not answer.
2. The connection runs the call in a task of its own, so that a caller can leave at any time.
3. The client sends the call over the transport: a process's standard streams, or HTTP.
4. The answer becomes text, and is cut at `output_max_bytes`.

Nothing is sent twice: a call that was under way when the connection was lost fails, because the server may have carried
it out. A server's hints that a tool only reads or is idempotent are not used. MCP calls them untrusted, and a wrong
hint would repeat a side effect after a crash.
"""

import asyncio
import json
import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import anyio
import httpx2
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from mcp import Client, ClientSession, MCPError, types
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

from agents.tool import ToolSpec
from runtime.tools.guarded_process import GuardedProcess, LineTooLong
from runtime.tools.mcp_settings import SERVER_NAME, McpSettings
from runtime.tools.tool import Tool, ToolError

__all__ = ["McpServer", "McpSettings"]

MESSAGE_MAX_BYTES = 16 << 20
"""A server that sends a longer message loses its connection (stdio), or the call fails (HTTP)."""

RUBBISH_MAX_BYTES = 1 << 20
"""A server that writes more than this to its standard output without a message in between loses its connection."""

CONNECT_TRIES = 3
"""How often one call tries to open a connection."""

BACKOFF_S = 0.25
BACKOFF_MAX_S = 8.0
"""The delay before a start, after the second failure in a row; it doubles with each one, up to the maximum."""

PROBE_S = 5.0
"""The time that a server has to list its tools again, if it left a call unanswered or was silent for long."""

HTTP_SILENCE_S = 30.0
"""An HTTP server that has answered nothing for this long is probed before the next call. It may have been restarted."""

CLOSE_S = 8.0
"""The time that a session has to end by itself. A process needs up to 4 s."""

EXIT_S = 0.5
"""The time that a process has to exit after it has closed its output."""

OUTPUT_MIN_BYTES = 256
DESCRIPTION_MAX_BYTES = 8 << 10
PAGES_MAX = 100
TOOL_NAME_MAX_CHARS = 64
REASON_MAX_CHARS = 2000

Incoming = MemoryObjectReceiveStream[SessionMessage | Exception]
Outgoing = MemoryObjectSendStream[SessionMessage]
T = TypeVar("T")

logger = logging.getLogger(__name__)


class McpServer:
    """An async context manager that owns an MCP server, or a connection to one, and gives its tools.

    Entering it returns the tools. They can be called until it is left, from any number of tasks. Leaving it ends the
    server's process and all its descendants, or the HTTP session. `output_max_bytes` bounds what a call returns.
    Make sure that the names of the tools do not clash with those of other servers; within one server it is checked.
    """

    def __init__(self, name: str, settings: McpSettings, output_max_bytes: int = 64 << 10) -> None:
        if not SERVER_NAME.fullmatch(name):
            raise ValueError(f"the name of an MCP server must match {SERVER_NAME.pattern}, unlike {name!r}")
        if output_max_bytes < OUTPUT_MIN_BYTES:
            raise ValueError(f"output_max_bytes must be at least {OUTPUT_MIN_BYTES}, unlike {output_max_bytes}")
        self.name = name
        self._settings = settings
        self._output_max_bytes = output_max_bytes
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None
        self._retired: dict[asyncio.Task[None], _Connection] = {}
        self._failures = 0
        self._next_start_s = 0.0
        self._running = False

    async def __aenter__(self) -> tuple[Tool, ...]:
        """Start the server or connect to it, and return its tools.

        Raise ToolError if it cannot be reached, does not speak MCP, or its tools cannot be used.
        """
        connection = _Connection(self.name, self._settings)
        await connection.open(self._settings.start_timeout_s)
        try:
            tools = self._chosen(connection.tools)
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        self._running = True
        return tools

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
        text = _cut(_text(result), self._output_max_bytes)
        if result.is_error:
            raise ToolError(text or f"The tool {tool} failed and gave no reason.")
        return text

    def _chosen(self, offered: Mapping[str, types.Tool]) -> tuple[Tool, ...]:
        """Return the tools that the settings choose. Raise ToolError if one is missing or cannot be used."""
        settings = self._settings
        chosen = list(offered) if settings.tools is None else list(dict.fromkeys(settings.tools))
        for field, names in (("tools", chosen), ("idempotent", settings.idempotent)):
            if missing := [name for name in names if name not in chosen or name not in offered]:
                raise ToolError(
                    f"The MCP server {self.name} has no tool {missing[0]!r}, or it is not chosen; correct `{field}`. "
                    f"The server's tools are {', '.join(offered)[:REASON_MAX_CHARS] or 'none'}."
                )
        tools = [McpTool(self, name, _spec(self.name, offered[name], name in settings.idempotent)) for name in chosen]
        for name, times in Counter(tool.spec.name for tool in tools).items():
            if times > 1:
                clashing = ", ".join(tool.remote_name for tool in tools if tool.spec.name == name)
                raise ToolError(
                    f"The tools {clashing} of the MCP server {self.name} would all be named {name}; "
                    "choose one of them with `tools`."
                )
        return tuple(tools)

    async def _connected(self) -> "_Connection":
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

    def _connect_ended(self, attempt: "asyncio.Task[_Connection]") -> None:
        self._connecting = None
        if not attempt.cancelled():
            attempt.exception()  # asyncio must not log it if all callers have left

    async def _connect(self) -> "_Connection":
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
            connection = _Connection(self.name, self._settings)
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

    def _retire(self, connection: "_Connection") -> None:
        """Close a connection in the background, after the calls that are under way on it."""
        task = asyncio.create_task(connection.close_when_idle(), name=f"mcp-{self.name}-close")
        self._retired[task] = connection
        task.add_done_callback(self._retired.pop)


class McpTool(Tool):
    """A tool of an MCP server. The server owns its lifetime."""

    def __init__(self, server: McpServer, remote_name: str, spec: ToolSpec) -> None:
        self.spec = spec
        self.remote_name = remote_name
        self._server = server

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """Call the tool. Takes at most `timeout_s`, and `start_timeout_s` in addition if the server must be started."""
        return await self._server.call(self.remote_name, arguments)


class _Connection:
    """One session with a server. A task owns it, because the client must be entered and left in the same task."""

    def __init__(self, name: str, settings: McpSettings) -> None:
        self.tools: dict[str, types.Tool] = {}
        self._name = name
        self._settings = settings
        self._transport: _Transport = _Stdio(name, settings) if settings.command else _Http(settings)
        self._session: ClientSession | None = None
        self._closing = asyncio.Event()
        self._opened: asyncio.Future[dict[str, types.Tool]] = asyncio.get_running_loop().create_future()
        self._calls: set[asyncio.Task[Any]] = set()
        self._heard_s = 0.0
        self._unanswered_s = 0.0

    @property
    def lost(self) -> str | None:
        """Why no call can be made any more, or None."""
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
                reason = f"The connection to the MCP server {self._name} was lost during the call: {self.lost}."
                raise ToolError(f"{reason} The tool {tool} may or may not have done its work.") from error
            if isinstance(error, MCPError):
                raise ToolError(f"The MCP server {self._name} refused the call of {tool}: {_reason(error)}") from error
            raise ToolError(
                f"The MCP server {self._name} gave an invalid answer to the call of {tool}: {_reason(error)}"
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
            self._transport.lose(_reason(error))
        self._transport.lose("it was closed")
        if not self._opened.done():
            try:
                self._refuse(str(self.lost))
            except ToolError as refusal:
                self._opened.set_exception(refusal)

    def _refuse(self, reason: str) -> NoReturn:
        raise ToolError(f"The MCP server {self._name} cannot be used: {reason}. {self._transport.advice()}")

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


class _Transport(ABC):
    """How messages get to a server and back. An async context manager that gives the client its two streams."""

    def __init__(self) -> None:
        self.lost: str | None = None

    def lose(self, reason: str) -> None:
        """Note that no further call can be made. The first reason is kept."""
        self.lost = self.lost or reason

    @abstractmethod
    async def __aenter__(self) -> tuple[Any, Any]: ...

    @abstractmethod
    async def __aexit__(self, *exc: object) -> None: ...

    @abstractmethod
    def advice(self) -> str:
        """Return what a user can do about a server that does not start."""


class _Stdio(_Transport):
    """The standard streams of a process. Lines that are no messages are skipped, up to a limit."""

    def __init__(self, name: str, settings: McpSettings) -> None:
        super().__init__()
        assert settings.command is not None
        command = (settings.command, *settings.args)
        environment = {**get_default_environment(), **settings.env}
        self._name = name
        self._command = settings.command
        self._process = GuardedProcess(f"mcp-{name}", command, environment, MESSAGE_MAX_BYTES)

    async def __aenter__(self) -> tuple[Incoming, Outgoing]:
        await self._process.__aenter__()
        received, read = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        write, to_send = anyio.create_memory_object_stream[SessionMessage](0)
        self._streams = (received, read, write, to_send)
        self._pumps = (
            asyncio.create_task(self._receive(received), name=f"mcp-{self._name}-receive"),
            asyncio.create_task(self._send(to_send, received), name=f"mcp-{self._name}-send"),
        )
        return read, write

    async def __aexit__(self, *exc: object) -> None:
        for pump in self._pumps:
            pump.cancel()
        for stream in self._streams:
            stream.close()
        await self._process.__aexit__(*exc)

    def advice(self) -> str:
        status = "" if self._process.status is None else f" It ended with status {self._process.status}."
        words = self._process.last_words()[-REASON_MAX_CHARS:]
        said = f" It wrote: {words}" if words else ""
        return f"Check `command` ({self._command}), `args` and `env`.{status}{said}"

    async def _receive(self, received: MemoryObjectSendStream[SessionMessage | Exception]) -> None:
        reason = "it ended or closed its output"
        rubbish_bytes = 0
        try:
            async for line in self._process.lines():
                message = _parsed(line)
                if message is None:
                    logger.debug("MCP server %s wrote no message: %r", self._name, line[:200])
                    rubbish_bytes += len(line) + 1
                    if rubbish_bytes > RUBBISH_MAX_BYTES:
                        reason = "it writes something else than MCP messages to its standard output"
                        break
                    continue
                rubbish_bytes = 0
                await received.send(message)
        except LineTooLong:
            reason = f"it wrote a line of more than {MESSAGE_MAX_BYTES} bytes"
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            reason = "it was closed"
        self.lose(reason)
        received.close()
        await self._process.exited(EXIT_S)  # so that its own exit status can be told
        self._process.end()

    async def _send(
        self,
        to_send: MemoryObjectReceiveStream[SessionMessage],
        received: MemoryObjectSendStream[SessionMessage | Exception],
    ) -> None:
        try:
            async for message in to_send:
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                await self._process.write(text.encode() + b"\n")
        except OSError:
            self.lose("it closed its input")
            received.close()


class _Http(_Transport):
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

    def __init__(self, connection: _Transport) -> None:
        self._connection = connection
        self._inner = httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_connections=None))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            response = await self._inner.handle_async_request(request)
        except httpx2.TransportError as error:
            if request.method != "POST":
                raise
            self._connection.lose(_reason(error))
            return _failed(request, 503, _reason(error))
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

    def __init__(self, response: httpx2.Response, connection: _Transport | None) -> None:
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
                self._connection.lose(_reason(error))
            raise httpx2.StreamError(_reason(error)) from error  # which fails this exchange and not the session

    async def aclose(self) -> None:
        await self._inner.aclose()


_CLIENT = types.Implementation(name="troupe", version="1")


def _failed(request: httpx2.Request, status: int, reason: str) -> httpx2.Response:
    error = {"code": types.INTERNAL_ERROR, "message": reason}
    return httpx2.Response(status, json={"jsonrpc": "2.0", "id": None, "error": error}, request=request)


def _parsed(line: bytes) -> SessionMessage | None:
    try:
        return SessionMessage(types.jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValidationError:
        return None


def _token(file: str) -> str:
    try:
        token = Path(file).expanduser().read_text().strip()
    except (OSError, ValueError) as error:
        raise ToolError(f"`token_file` {file} cannot be read: {error}") from None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ToolError(f"`token_file` {file} must hold one token and nothing else")
    return token


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


def _spec(server: str, tool: types.Tool, idempotent: bool) -> ToolSpec:
    """Return what a model is told about a tool. Raise ToolError if its name is too long or its schema is none."""
    name = f"{server}_{re.sub(r'[^A-Za-z0-9_-]', '_', tool.name)}"
    if len(name) > TOOL_NAME_MAX_CHARS:
        raise ToolError(
            f"The name {name[:200]} of a tool of the MCP server {server} has more than {TOOL_NAME_MAX_CHARS} "
            "characters; give the server a shorter name, or leave the tool out with `tools`."
        )
    schema = tool.input_schema
    try:
        validator_for(schema).check_schema(schema)
    except (SchemaError, TypeError) as error:  # TypeError: a `$schema` that is no text
        raise ToolError(
            f"The tool {tool.name} of the MCP server {server} has an invalid schema ({_reason(error)[:200]}); "
            "leave the tool out with `tools`."
        ) from None
    description = tool.description or tool.title or tool.name
    return ToolSpec(name, _cut(description, DESCRIPTION_MAX_BYTES), schema, idempotent)


def _text(result: types.CallToolResult) -> str:
    """Return a result as text: text as it is, structured content if there is no text, and a line per other content."""
    parts = [_block_text(block) for block in result.content]
    has_text = any(isinstance(block, types.TextContent) for block in result.content)
    if not has_text and result.structured_content is not None:
        parts.insert(0, json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(parts)


def _block_text(block: types.ContentBlock) -> str:
    match block:
        case types.TextContent():
            return block.text
        case types.ImageContent() | types.AudioContent():
            return f"[{block.type}: {block.mime_type}, {len(block.data) * 3 // 4} bytes, not shown]"
        case types.ResourceLink():
            return f"[resource: {block.uri}, {block.mime_type or 'unknown type'}, not shown]"
        case types.EmbeddedResource(resource=resource):
            return f"[resource: {resource.uri}, {resource.mime_type or 'unknown type'}, not shown]"


def _cut(text: str, max_bytes: int) -> str:
    """Return a text of at most this many bytes in UTF-8. The last line says so if the text was longer."""
    data = text.encode(errors="replace")
    if len(data) <= max_bytes:
        return data.decode()
    notice = f"\n[cut: the output has {len(data)} bytes and may have {max_bytes}]"
    return data[: max(0, max_bytes - len(notice))].decode(errors="ignore") + notice


def _reason(error: BaseException) -> str:
    """Return what an error says, in one short line. Of a group, the first error counts."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(str(error).split())[:REASON_MAX_CHARS] or type(error).__name__
