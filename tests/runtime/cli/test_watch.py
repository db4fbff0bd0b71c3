"""The tables of `troupe solve --watch`."""

import re
from pathlib import Path

from rich.console import Console

from runtime.cli import watch
from tests.runtime.api.http.conftest import configured, pause_solver, service


async def test_pause_costs_and_lanes_are_shown(tmp_path: Path) -> None:
    screen = Console(width=100)
    async with service(configured(tmp_path), time_scale=1) as served:
        await pause_solver(served)
        with screen.capture() as shown:
            screen.print(watch.tables(served.backend.ready_team()))
    assert re.search(r"solver +solver +ready .* 0, paused \d+\.\d s", shown.get())
    assert re.search(r"planner +planner +ready .* 0 of \d+", shown.get())
    assert re.search(r"solver +\d+\.\d ms +\d+\.\d\d ms +\d+\.\d µs +\d+%", shown.get())
    assert re.search(r"\d\.\d engines at full speed at once \(\d+% measured\)", shown.get())
