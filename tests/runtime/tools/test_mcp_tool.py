"""MCP servers as real processes, over standard streams and over HTTP: what they offer, and every way they can fail."""

import asyncio
import functools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from mcp import Client
from pydantic import ValidationError

from runtime.tools import mcp_tool
from runtime.tools.mcp_tool import McpServer, McpSettings
from runtime.tools.tool import Tool, ToolError

ROOT = Path(__file__).resolve().parents[3]
STUB = str(ROOT / "tests/stubs/mcp_server.py")
RAW = str(ROOT / "tests/stubs/mcp_raw_server.py")
PATIENCE_S = 60.0
"""For a machine that is busy. No test waits this long if all is well."""

OWNER = """
import asyncio, sys
from runtime.tools.mcp_tool import McpServer, McpSettings

async def main():
    async with McpServer("stub", McpSettings(command=sys.executable, args=(sys.argv[1],))) as tools:
        by_name = {tool.spec.name: tool for tool in tools}
        print(await by_name["stub_pid"].call({}), await by_name["stub_child"].call({}), flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""

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
async def running(settings: McpSettings, **options: Any) -> AsyncIterator[Call]:
    async with McpServer("s", settings, **options) as tools:
        yield caller(tools)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 (other processes fulfil the conditions)
            await asyncio.sleep(0.02)


def stat(pid: int) -> list[str]:
    """Return the state and what follows it of a process, or nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def gone(pid: int) -> bool:
    return stat(pid)[:1] in ([], ["Z"])


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
        monkeypatch.setattr(mcp_tool, "Client", functools.partial(Client, mode="legacy"))
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


# What a server offers


async def test_tools_have_names_descriptions_and_schemas(settings: Callable[..., McpSettings]) -> None:
    async with McpServer("s", settings(tools=("add", "pid"), idempotent=("pid",))) as tools:
        assert [tool.spec.name for tool in tools] == ["s_add", "s_pid"]
        add = tools[0].spec
        assert add.description == "Add two numbers."
        assert add.parameters["required"] == ["a", "b"]
        assert add.parameters["properties"]["a"]["type"] == "integer"
        assert [tool.spec.idempotent for tool in tools] == [False, True]  # the server's hints do not count
        assert await tools[0].call({"a": 1, "b": 2}) == "3"


async def test_tools_of_all_pages_are_listed() -> None:
    async with McpServer("s", raw("")) as tools:
        assert [tool.spec.name for tool in tools] == ["s_echo", "s_odd", "s_other"]


@pytest.mark.parametrize("field", ["tools", "idempotent"])
async def test_unknown_tool_in_settings_is_refused(field: str) -> None:
    with pytest.raises(ToolError, match=rf"no tool 'nonsense'.*`{field}`.*echo, odd, other"):
        async with McpServer("s", raw("").model_copy(update={field: ("nonsense",)})):
            pass


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("clash", "oth/er, oth.er .* would all be named s_oth_er"),
        ("long name", "s_n{63} .* more than 64 characters"),
        ("schema", "oth.er .* invalid schema"),
    ],
)
async def test_unusable_tool_is_refused_unless_left_out(behaviour: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        async with McpServer("s", raw(behaviour)):
            pass
    async with running(raw(behaviour, tools=("echo",))) as call:
        assert await call("echo", value=1) == "1"


async def test_tool_names_fit_model_apis() -> None:
    async with McpServer("s", raw("name")) as tools:
        assert [tool.spec.name for tool in tools] == ["s_echo", "s_odd", "s_oth_er"]
        assert await tools[2].call({"value": "x"}) == '"x"'  # the server is called by its own name for the tool


@pytest.mark.parametrize("name", ["", "a b", "ä", "n" * 33])
def test_server_name_must_fit_tool_names(name: str) -> None:
    with pytest.raises(ValueError, match="name of an MCP server"):
        McpServer(name, raw(""))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of `command` and `url`"),
        ({"command": "a", "url": "http://h"}, "exactly one of `command` and `url`"),
        ({"url": "http://h", "args": ("a",)}, "`args` and `env` belong to `command`"),
        ({"url": "http://h", "env": {"A": "b"}}, "`args` and `env` belong to `command`"),
        ({"command": "a", "token_file": "t"}, "`token_file` belongs to `url`"),
        ({"url": "ftp://h"}, "url\n.*must start with http"),
        ({"url": "http://user:secret@h"}, "url\n.*`token_file`"),
        ({"command": "a", "timeout_s": 0}, "timeout_s"),
        ({"command": "a", "nonsense": 0}, "nonsense"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        McpSettings(**fields)


def test_settings_do_not_show_the_environment() -> None:
    assert "secret" not in repr(McpSettings(command="a", env={"KEY": "secret"}))


# Output


async def test_other_content_than_text_is_named(settings: Callable[..., McpSettings]) -> None:
    async with running(settings()) as call:
        assert (await call("media")).splitlines() == [
            "first",
            "[image: image/png, 3 bytes, not shown]",
            "[audio: audio/wav, 3 bytes, not shown]",
            "[resource: file:///a.txt, unknown type, not shown]",
            "[resource: file:///b.txt, text/plain, not shown]",
            "last",
        ]
        assert json.loads(await call("table")) == {"rows": 2}


async def test_structured_content_is_returned_if_there_is_no_text() -> None:
    async with running(raw("image")) as call:
        assert await call("odd") == '{"ä": 1}\n[image: image/png, 3 bytes, not shown]'


async def test_long_output_is_cut() -> None:
    async with running(stub(), output_max_bytes=301) as call:
        assert await call("text", size=150) == "ä" * 150
        *shown, notice = (await call("text", size=1000)).splitlines()
        assert notice == "[cut: the output has 2000 bytes and may have 301]"
        assert 250 < len("\n".join([*shown, notice]).encode()) <= 301
        with pytest.raises(ToolError) as failure:
            await call("fail", reason="r" * 1000)
        assert len(str(failure.value)) <= 301


async def test_failed_tool_raises_its_text(settings: Callable[..., McpSettings]) -> None:
    async with running(settings()) as call:
        with pytest.raises(ToolError, match="Error executing tool fail"):
            await call("fail", reason="the moon")
        with pytest.raises(ToolError, match="valid integer"):
            await call("add", a="x", b=1)
        assert await call("add", a=1, b=1) == "2"


# Starting


async def test_missing_command_is_named() -> None:
    with pytest.raises(ToolError, match=r"MCP server s cannot.*`command` \(/no/such\).*127.*No such file"):
        async with McpServer("s", McpSettings(command="/no/such")):
            pass


async def test_last_words_of_a_server_that_does_not_start_are_shown() -> None:
    settings = McpSettings(command=sys.executable, args=("-c", "import sys; sys.exit('no licence')"))
    with pytest.raises(ToolError, match=r"status 1.*no licence"):
        async with McpServer("s", settings):
            pass


async def test_unreachable_url_is_named() -> None:
    with pytest.raises(ToolError, match=r"MCP server s cannot be used: .*`url` \(http://127.0.0.1:9/mcp\)"):
        async with McpServer("s", McpSettings(url="http://127.0.0.1:9/mcp?key=secret")) as tools:
            caller(tools)


async def test_server_that_never_starts_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"within 0.5 s \(`start_timeout_s`\)"):
        async with McpServer("s", raw("no start", tmp_path, start_timeout_s=0.5)):
            pass


async def test_server_may_take_long_to_start() -> None:
    async with running(raw("slow start")) as call:
        assert await call("echo", value=1) == "1"


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


async def test_server_inherits_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_SECRET", "secret")
    async with running(stub(env={"GIVEN": "value"})) as call:
        environment = json.loads(await call("environment"))
    assert environment["GIVEN"] == "value"
    assert set(environment) <= {"GIVEN", "HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "LC_CTYPE"}


# Calls that overlap, end early or take too long


async def test_many_calls_overlap(settings: Callable[..., McpSettings], tmp_path: Path) -> None:
    async with running(settings()) as call:
        slow = asyncio.ensure_future(call("wait", note=str(tmp_path / "note"), seconds=0.5))
        sums = await asyncio.gather(*(call("add", a=number, b=1) for number in range(200)))
        assert sums == [str(number + 1) for number in range(200)]
        assert await slow == "waited"


async def test_cancelled_call_is_cancelled_at_the_server(settings: Callable[..., McpSettings], tmp_path: Path) -> None:
    note = tmp_path / "note"
    async with running(settings()) as call:
        pid = await call("pid")
        cancelled = asyncio.ensure_future(call("wait", note=str(note)))
        other = asyncio.ensure_future(call("wait", note=str(tmp_path / "other"), seconds=1))
        await until(holds(note, "started"))
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await until(holds(note, "cancelled"))
        assert await other == "waited"
        assert await call("pid") == pid


async def test_call_that_takes_too_long_is_cancelled_and_the_session_stays(
    settings: Callable[..., McpSettings], tmp_path: Path
) -> None:
    note = tmp_path / "note"
    async with running(settings(timeout_s=2)) as call:
        pid = await call("pid")
        with pytest.raises(ToolError, match="did not answer within 2 s"):
            await call("wait", note=str(note))
        await until(holds(note, "cancelled"))
        assert await call("pid") == pid


async def test_hanging_server_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_tool, "PROBE_S", 0.5)
    async with running(stub(timeout_s=5)) as call:
        pid = int(await call("pid"))
        blocked = asyncio.ensure_future(call("block", note=str(tmp_path / "note")))
        await until(holds(tmp_path / "note", "started"))
        large = asyncio.ensure_future(call("add", a="x" * (4 << 20), b=1))  # more than the pipe holds
        for hanging in (blocked, large):
            with pytest.raises(ToolError, match="did not answer within 5 s"):
                await hanging
        assert int(await call("pid")) != pid
        await until(lambda: gone(pid))


async def test_caller_may_leave_while_the_server_restarts() -> None:
    async with running(stub()) as call:
        with pytest.raises(ToolError, match="lost"):
            await call("leave")
        leaving = [asyncio.ensure_future(call("add", a=1, b=1)) for _ in range(3)]
        await asyncio.sleep(0.05)
        for task in leaving[:2]:
            task.cancel()
        assert await leaving[2] == "2"
        assert await call("add", a=2, b=2) == "4"


# Servers that die or misbehave


async def test_killed_server_fails_the_call_under_way_only(tmp_path: Path) -> None:
    note = tmp_path / "note"
    async with running(stub()) as call, running(stub()) as other:
        pid, other_pid = int(await call("pid")), await other("pid")
        under_way = asyncio.ensure_future(call("wait", note=str(note)))
        others = asyncio.ensure_future(other("wait", note=str(tmp_path / "other"), seconds=1))
        await until(holds(note, "started"))
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(30):  # half of what the call may take
            with pytest.raises(ToolError, match=r"lost during the call.*may or may not have done its work"):
                await under_way
        assert int(await call("pid")) != pid
        assert note.read_text() == "started\n"  # the call was not sent again
        assert await others == "waited"
        assert await other("pid") == other_pid


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
    monkeypatch.setattr(mcp_tool, "HTTP_SILENCE_S", 0.0)
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


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("invalid", "invalid answer"),
        ("refuse", "refused the call of odd: no such luck"),
        ("flood", "lost.*something else than MCP"),
        ("long line", "lost.*more than 1048576 bytes"),
        ("close", "lost.*closed its output"),
        ("stderr flood", "did not answer"),
        ("silent", "did not answer"),
    ],
)
async def test_misbehaving_server_fails_one_call(
    behaviour: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mcp_tool, "MESSAGE_MAX_BYTES", 1 << 20)
    monkeypatch.setattr(mcp_tool, "PROBE_S", 2.0)
    timeout_s = 2 if message == "did not answer" else 60
    async with running(raw(behaviour, timeout_s=timeout_s)) as call:
        with pytest.raises(ToolError, match=message):
            await call("odd")
        assert await call("echo", value=[1]) == "[1]"
    assert capfd.readouterr() == ("", "")


async def test_lines_that_are_no_messages_are_skipped() -> None:
    async with running(raw("rubbish")) as call:
        assert await call("odd") == "after rubbish"


async def test_noise_on_standard_error_stays_off_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    async with running(stub()) as call:
        assert await call("noise", size=8 << 20) == "written"
    assert capfd.readouterr() == ("", "")


async def test_restarts_are_delayed_more_and_more(tmp_path: Path) -> None:
    async with running(raw("flaky", tmp_path)) as call:
        with pytest.raises(ToolError, match="lost"):
            await call("odd")
        assert await call("echo", value=1) == "1"
    starts = [float(line) for line in (tmp_path / "starts").read_text().splitlines()]
    assert len(starts) == 4
    assert starts[2] - starts[1] >= mcp_tool.BACKOFF_S
    assert starts[3] - starts[2] >= 2 * mcp_tool.BACKOFF_S


async def test_restarts_are_given_up(tmp_path: Path) -> None:
    async with running(raw("once", tmp_path)) as call:
        with pytest.raises(ToolError, match="lost"):
            await call("odd")
        failures = await asyncio.gather(*(call("echo") for _ in range(5)), return_exceptions=True)
        assert all(isinstance(failure, ToolError) and "not today" in str(failure) for failure in failures)
    assert len((tmp_path / "starts").read_text().splitlines()) == 1 + mcp_tool.CONNECT_TRIES


async def test_tool_that_is_gone_after_a_restart_is_reported(tmp_path: Path) -> None:
    async with running(raw("shrink", tmp_path)) as call:
        assert await call("other", value=1) == "1"
        with pytest.raises(ToolError, match="lost"):
            await call("odd")
        with pytest.raises(ToolError, match="no longer has the tool other"):
            await call("other", value=1)
        assert await call("echo", value=1) == "1"


# Ending


async def test_leaving_ends_all_processes() -> None:
    async with running(stub()) as call:
        server, child = int(await call("pid")), int(await call("child"))
        guard = int(stat(server)[1])
        assert guard != os.getpid()
        assert not any(map(gone, (server, child, guard)))
        left_s = time.monotonic()
    assert all(map(gone, (server, child, guard)))
    assert time.monotonic() - left_s < 30
    with pytest.raises(ToolError, match="stopped"):
        await call("pid")


async def test_leaving_fails_the_calls_under_way(settings: Callable[..., McpSettings], tmp_path: Path) -> None:
    note = tmp_path / "note"
    async with running(settings()) as call:
        under_way = asyncio.ensure_future(call("wait", note=str(note)))
        await until(holds(note, "started"))
        left_s = time.monotonic()
    with pytest.raises(ToolError, match="lost during the call: it was closed"):
        await under_way
    assert time.monotonic() - left_s < 30
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("mcp-")]


async def test_killed_server_leaves_no_child_behind() -> None:
    async with running(stub()) as call:
        server, child = int(await call("pid")), int(await call("child"))
        os.kill(server, signal.SIGKILL)
        await until(lambda: gone(child))


@pytest.mark.parametrize("victim", ["owner", "guard"])
async def test_nothing_survives_sigkill_of_the_owner_or_the_guard(victim: str) -> None:
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER, STUB), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        assert owner.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            server, child = map(int, (await owner.stdout.readline()).split())
        guard = int(stat(server)[1])
        os.kill(owner.pid if victim == "owner" else guard, signal.SIGKILL)
        await until(lambda: gone(server) and gone(guard))
        if victim == "owner":
            await until(lambda: gone(child))
        else:
            os.kill(child, signal.SIGKILL)  # a child in a session of its own outlives the guard's SIGKILL
    finally:
        if owner.returncode is None:
            owner.kill()
        await owner.wait()


async def test_cancelled_start_leaves_nothing_behind(tmp_path: Path) -> None:
    entering = asyncio.ensure_future(McpServer("s", raw("no start", tmp_path)).__aenter__())
    await until((tmp_path / "starting").exists)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("mcp-")]
    assert not any(
        str(tmp_path) in " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])
    )
