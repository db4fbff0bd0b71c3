"""Calls that overlap, end early or take too long."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.tools.mcp.settings import McpSettings
from runtime.tools.tool import ToolError
from tests.runtime.tools.mcp.servers import holds, running
from tests.runtime.tools.processes import until


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
