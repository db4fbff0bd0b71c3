"""An MCP server that is a process of its own and talks over its standard streams."""

import asyncio
import logging

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp import types
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

from runtime.tools.mcp.errors import REASON_MAX_CHARS
from runtime.tools.mcp.settings import McpSettings
from runtime.tools.mcp.transport import MESSAGE_MAX_BYTES, Transport
from runtime.tools.process.guarded_process import GuardedProcess, LineTooLong

RUBBISH_MAX_BYTES = 1 << 20
"""A server that writes more than this to its standard output without a message in between loses its connection."""

EXIT_S = 0.5
"""The time that a process has to exit after it has closed its output."""

Incoming = MemoryObjectReceiveStream[SessionMessage | Exception]
Outgoing = MemoryObjectSendStream[SessionMessage]

logger = logging.getLogger(__name__)


class StdioTransport(Transport):
    """The standard streams of a process. Lines that are no messages are skipped, up to a limit."""

    def __init__(self, name: str, settings: McpSettings) -> None:
        super().__init__()
        assert settings.command is not None
        command = (settings.command, *settings.args)
        environment = {
            **get_default_environment(),
            **{name: value.get_secret_value() for name, value in settings.env.items()},
        }
        self._name = name
        self._command = settings.command
        self._process = GuardedProcess(f"mcp-{name}", command, MESSAGE_MAX_BYTES, environment)

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
        ending = self._process.ending()
        how = "" if ending is None else f" It ended {ending}."
        words = self._process.last_words()[-REASON_MAX_CHARS:]
        said = f" It wrote: {words}" if words else ""
        return f"Check `command` ({self._command}), `args` and `env`.{how}{said}"

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


def _parsed(line: bytes) -> SessionMessage | None:
    try:
        return SessionMessage(types.jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValidationError:
        return None
