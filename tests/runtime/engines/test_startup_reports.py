"""Reports from an engine's process reach the listener in order."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from runtime.engines import startup_reports
from runtime.engines.handle import EngineState


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_reports_arrive_in_order(tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def take_two() -> list[tuple[str, EngineState]]:
        taken: asyncio.Queue[tuple[str, EngineState]] = asyncio.Queue()
        with startup_reports.listening(tmp_path, lambda engine, state: taken.put_nowait((engine, state))):
            startup_reports.send(tmp_path, "solver", EngineState.LOADING)
            startup_reports.send(tmp_path, "critic", EngineState.LOADED)
            async with asyncio.timeout(60):
                return [await taken.get(), await taken.get()]

    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(take_two()) == [("solver", EngineState.LOADING), ("critic", EngineState.LOADED)]


def test_a_missing_listener_is_ignored(tmp_path: Path) -> None:
    startup_reports.send(tmp_path, "solver", EngineState.LOADING)
