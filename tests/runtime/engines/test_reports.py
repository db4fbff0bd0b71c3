"""Reports from an engine's process reach the listener; nobody listening is no error."""

import asyncio
from pathlib import Path

from runtime.engines import reports
from runtime.engines.base import EngineState


async def test_reports_are_taken_in_order(tmp_path: Path) -> None:
    taken: asyncio.Queue[tuple[str, EngineState]] = asyncio.Queue()
    listener = await reports.listen(tmp_path, lambda engine, state: taken.put_nowait((engine, state)))
    reports.send(tmp_path, "solver", EngineState.LOADING)
    reports.send(tmp_path, "critic", EngineState.LOADED)
    async with asyncio.timeout(5):
        assert await taken.get() == ("solver", EngineState.LOADING)
        assert await taken.get() == ("critic", EngineState.LOADED)
    listener.close()


def test_nobody_listening_is_no_error(tmp_path: Path) -> None:
    reports.send(tmp_path, "solver", EngineState.LOADING)
