"""`troupe engines` shows what a service returns, in tables and as JSON."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from runtime.cli.engines import engines
from tests.runtime.api.http.conftest import Served, configured, pause_solver, service


async def test_pause_costs_and_lanes_are_shown(tmp_path: Path) -> None:
    async with service(configured(tmp_path), time_scale=1) as served:
        await pause_solver(served)
        table, found = await invoke(served), json.loads((await invoke(served, "--json")).output)
    assert re.search(r"solver +solver +ready .* paused \d+\.\d s", table.output)
    assert re.search(r"solver +\d+\.\d ms +\d+\.\d\d ms +\d+\.\d µs +\d+%", table.output)
    assert re.search(r"\d\.\d engines at full speed at once \(\d+% measured\)", table.output)
    assert [engine["name"] for engine in found["engines"]] == ["planner", "solver", "critic"]
    assert found["engines"][1]["paused_s"] > 0
    assert found["engines"][1]["cost"]["confidence"] > 0
    assert found["devices"]["0"]["lanes"] >= 1


@pytest.mark.parametrize(
    ("url", "token", "said"),
    [
        ("http://localhost:80a0", "", "no service answers at http://localhost:80a0/engines: nonnumeric port"),
        ("http://localhost:1", "sec\rret", "TROUPE_TOKEN has a character that no token has"),
    ],
)
def test_a_wrong_address_or_token_is_named(monkeypatch: pytest.MonkeyPatch, url: str, token: str, said: str) -> None:
    monkeypatch.setenv("TROUPE_TOKEN", token)
    result = CliRunner().invoke(engines, ["--url", url])
    assert said in str(result.exception)
    assert "ret" not in str(result.exception)


async def invoke(served: Served, *options: str) -> Result:
    """Run the command in a thread, while the service runs on the event loop."""
    result = await asyncio.to_thread(CliRunner().invoke, engines, ["--url", served.url, *options])
    assert result.exit_code == 0, result.output
    return result
