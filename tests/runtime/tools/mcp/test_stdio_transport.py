"""Servers over standard streams: how they start, what they may write, and how they end."""

import asyncio
import json
import os
import signal
import sys
import time

import psutil
import pytest

from runtime.tools.mcp import connection, stdio_transport
from runtime.tools.mcp.server import McpServer
from runtime.tools.mcp.settings import McpSettings
from runtime.tools.tool import ToolError
from tests.runtime.tools.mcp.servers import ROOT, STUB, raw, running, stub
from tests.runtime.tools.processes import LONG_S, all_end, lives

OWNER = """
import asyncio, sys
from runtime.tools.mcp.server import McpServer
from runtime.tools.mcp.settings import McpSettings

async def main():
    async with McpServer("stub", McpSettings(command=sys.executable, args=(sys.argv[1],))) as tools:
        by_name = {tool.spec.name: tool for tool in tools}
        print(await by_name["stub_pid"].call({}), await by_name["stub_child"].call({}), flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


async def test_missing_command_is_named() -> None:
    with pytest.raises(ToolError, match=r"MCP server s cannot.*`command` \(/no/such\).*127.*No such file"):
        async with McpServer("s", McpSettings(command="/no/such")):
            pass


async def test_last_words_of_a_server_that_does_not_start_are_shown() -> None:
    settings = McpSettings(command=sys.executable, args=("-c", "import sys; sys.exit('no licence')"))
    with pytest.raises(ToolError, match=r"status 1.*no licence"):
        async with McpServer("s", settings):
            pass


async def test_server_inherits_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_SECRET", "secret")
    async with running(stub(env={"GIVEN": "value"})) as call:
        environment = json.loads(await call("environment"))
    assert environment["GIVEN"] == "value"
    assert set(environment) <= {"GIVEN", "HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "LC_CTYPE"}


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
    monkeypatch.setattr(stdio_transport, "MESSAGE_MAX_BYTES", 1 << 20)
    monkeypatch.setattr(connection, "PROBE_S", 2.0)
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


async def test_leaving_ends_all_processes() -> None:
    async with running(stub()) as call:
        server, child = int(await call("pid")), int(await call("child"))
        guard = psutil.Process(server).ppid()
        assert guard != os.getpid()
        assert all(map(lives, (server, child, guard)))
        left_s = time.monotonic()
    assert not any(map(lives, (server, child, guard)))
    assert time.monotonic() - left_s < 30
    with pytest.raises(ToolError, match="stopped"):
        await call("pid")


async def test_killed_server_leaves_no_child_behind() -> None:
    async with running(stub()) as call:
        server, child = int(await call("pid")), int(await call("child"))
        os.kill(server, signal.SIGKILL)
        await all_end([child])


@pytest.mark.parametrize("victim", ["owner", "guard"])
async def test_nothing_survives_sigkill_of_the_owner_or_the_guard(victim: str) -> None:
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER, STUB), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        assert owner.stdout is not None
        async with asyncio.timeout(LONG_S):
            server, child = map(int, (await owner.stdout.readline()).split())
        guard = psutil.Process(server).ppid()
        os.kill(owner.pid if victim == "owner" else guard, signal.SIGKILL)
        await all_end([server, guard])
        if victim == "owner":
            await all_end([child])
        else:
            os.kill(child, signal.SIGKILL)  # a child in a session of its own outlives the guard's SIGKILL
    finally:
        if owner.returncode is None:
            owner.kill()
        await owner.wait()
