"""Servers that start slowly, hang or die: when they get a new connection."""

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from runtime.tools.mcp import connection, server
from runtime.tools.mcp.server import McpServer
from runtime.tools.tool import ToolError
from tests.runtime.tools.mcp.servers import holds, raw, running, stub
from tests.runtime.tools.processes import all_end, until


async def test_server_that_never_starts_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"within 0.5 s \(`start_timeout_s`\)"):
        async with McpServer("s", raw("no start", tmp_path, start_timeout_s=0.5)):
            pass


async def test_server_may_take_long_to_start() -> None:
    async with running(raw("slow start")) as call:
        assert await call("echo", value=1) == "1"


async def test_hanging_server_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PROBE_S", 0.5)
    async with running(stub(timeout_s=5)) as call:
        pid = int(await call("pid"))
        blocked = asyncio.ensure_future(call("block", note=str(tmp_path / "note")))
        await until(holds(tmp_path / "note", "started"))
        large = asyncio.ensure_future(call("add", a="x" * (4 << 20), b=1))  # more than the pipe holds
        for hanging in (blocked, large):
            with pytest.raises(ToolError, match="did not answer within 5 s"):
                await hanging
        assert int(await call("pid")) != pid
        await all_end([pid])


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


async def test_restarts_are_delayed_more_and_more(tmp_path: Path) -> None:
    async with running(raw("flaky", tmp_path)) as call:
        with pytest.raises(ToolError, match="lost"):
            await call("odd")
        assert await call("echo", value=1) == "1"
    starts = [float(line) for line in (tmp_path / "starts").read_text().splitlines()]
    assert len(starts) == 4
    assert starts[2] - starts[1] >= server.BACKOFF_S
    assert starts[3] - starts[2] >= 2 * server.BACKOFF_S


async def test_restarts_are_given_up(tmp_path: Path) -> None:
    async with running(raw("once", tmp_path)) as call:
        with pytest.raises(ToolError, match="lost"):
            await call("odd")
        failures = await asyncio.gather(*(call("echo") for _ in range(5)), return_exceptions=True)
        assert all(isinstance(failure, ToolError) and "not today" in str(failure) for failure in failures)
    assert len((tmp_path / "starts").read_text().splitlines()) == 1 + server.CONNECT_TRIES


async def test_tool_that_is_gone_after_a_restart_is_reported(tmp_path: Path) -> None:
    async with running(raw("shrink", tmp_path)) as call:
        assert await call("other", value=1) == "1"
        with pytest.raises(ToolError, match="lost"):
            await call("odd")
        with pytest.raises(ToolError, match="no longer has the tool other"):
            await call("other", value=1)
        assert await call("echo", value=1) == "1"


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
