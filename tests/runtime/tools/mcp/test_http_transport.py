"""Servers over HTTP: how they are reached, and how their exchanges fail."""

import asyncio
from pathlib import Path

import pytest

from runtime.tools.mcp import connection
from runtime.tools.mcp.server import McpServer
from runtime.tools.mcp.settings import McpSettings
from runtime.tools.tool import ToolError
from tests.runtime.tools.mcp.servers import HttpStub, caller, holds, running
from tests.runtime.tools.processes import until


async def test_unreachable_url_is_named() -> None:
    with pytest.raises(ToolError, match=r"MCP server s cannot be used: .*`url` \(http://127.0.0.1:9/mcp\)"):
        async with McpServer("s", McpSettings(url="http://127.0.0.1:9/mcp?key=secret")) as tools:
            caller(tools)


async def test_token_is_sent_and_a_refusal_is_reported(tmp_path: Path) -> None:
    heads: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    token = tmp_path / "token"
    token.write_text("abc\n")
    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp"
        with pytest.raises(ToolError, match=r"HTTP status 401.*`token_file`"):
            async with McpServer("s", McpSettings(url=url, token_file=str(token))):
                pass
    assert heads
    assert all(b"\r\nauthorization: bearer abc\r\n" in head.lower() for head in heads)


@pytest.mark.parametrize("content", [None, "", "two words", "ü"])
async def test_unusable_token_file_is_named(tmp_path: Path, content: str | None) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content)
    with pytest.raises(ToolError, match=f"`token_file` {token} "):
        async with McpServer("s", McpSettings(url="http://127.0.0.1:9", token_file=str(token))):
            pass


@pytest.mark.parametrize("transport", ["http", "http-session"], indirect=True)
@pytest.mark.usefixtures("transport")
async def test_killed_http_server_can_come_back(http_stub: HttpStub, tmp_path: Path) -> None:
    note = tmp_path / "note"
    async with running(http_stub.settings(start_timeout_s=2)) as call:
        pid = await call("pid")
        under_way = asyncio.ensure_future(call("wait", note=str(note)))
        await until(holds(note, "started"))
        await http_stub.kill()
        async with asyncio.timeout(30):
            with pytest.raises(ToolError, match="lost during the call"):
                await under_way
        with pytest.raises(ToolError, match=r"MCP server s cannot be used.*`url`"):
            await call("pid")
        await http_stub.start()
        assert await call("pid") != pid
        assert note.read_text() == "started\n"


@pytest.mark.parametrize("transport", ["http", "http-session"], indirect=True)
@pytest.mark.usefixtures("transport")
async def test_restart_of_an_idle_http_server_is_noticed(http_stub: HttpStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HTTP_SILENCE_S", 0.0)
    async with running(http_stub.settings()) as call:
        pid = await call("pid")
        await http_stub.kill()
        await http_stub.start()
        assert await call("pid") != pid


async def test_broken_http_exchange_leaves_the_others_alone(http_stub: HttpStub, tmp_path: Path) -> None:
    """Two calls go through a relay, which cuts the connection of one."""
    cut: list[asyncio.StreamWriter] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if b"/cut" in data:
                cut.append(client)
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", http_stub.port)
        await asyncio.gather(copy(reader, server_writer, writer), copy(server_reader, writer, writer))

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp"
        async with running(McpSettings(url=url, timeout_s=60, start_timeout_s=60)) as call:
            notes = tmp_path / "cut", tmp_path / "kept"
            broken, kept = (
                asyncio.ensure_future(call("wait", note=str(note), seconds=seconds))
                for note, seconds in zip(notes, (3600, 2), strict=True)
            )
            await until(lambda: all(holds(note, "started")() for note in notes))
            cut[0].transport.abort()
            async with asyncio.timeout(30):
                with pytest.raises(ToolError, match="lost during the call"):
                    await broken
            assert await call("add", a=1, b=1) == "2"
            assert await kept == "waited"
