"""Replicas come and go on modelled devices while jobs run, without a lost request or a device over its budget."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from agents.role import Message
from runtime import config
from runtime.assembly import RunningTeam
from runtime.devices.rebalancing import IDLE_S
from runtime.engines.handle import EngineState
from runtime.engines.replicas import device_of
from runtime.engines.request import GenerateRequest
from runtime.errors import EngineError
from runtime.jobs.batch import work_all
from runtime.jobs.job import Job, JobResult
from runtime.simulation.assembly import start_modelled_team
from tests.runtime.fakes import embedded_team

pytestmark = pytest.mark.virtual_time
PROBLEM = "(12+7)*3-(45-5)"
PLACED = {"0": ("planner", "solver"), "1": ("critic",)}


@asynccontextmanager
async def running(bounds: Mapping[str, tuple[int, int]]) -> AsyncIterator[RunningTeam]:
    found = config.load("embedded")
    async with start_modelled_team(
        found, embedded_team(), time_scale=20, devices=2, placed=PLACED, replica_bounds=bounds
    ) as made:
        watching = asyncio.create_task(_watch(made))
        yield made
        watching.cancel()
        await asyncio.wait([watching])
        assert watching.cancelled()


async def _watch(made: RunningTeam) -> None:
    """Fail if a device exceeds its budget."""
    while True:
        for device in made.devices.values():
            held = sum(engine.held_bytes for engine in device.engines.values())
            assert held <= device.sharing.ledger.budget_bytes
            assert sum(device.sharing.ledger.held.values()) <= device.sharing.ledger.budget_bytes
        await asyncio.sleep(0.05)


async def work(made: RunningTeam, count: int = 400) -> list[JobResult]:
    results: list[JobResult] = []
    jobs = [Job(str(number), PROBLEM, expected="17") for number in range(count)]
    await work_all(made.orchestrator, jobs, 100, results.append)
    return results


def states(made: RunningTeam, engine: str) -> list[EngineState]:
    return [made.engines[f"{engine}@{device}"].stats().state for device in (0, 1)]


async def test_a_replica_is_added_under_load_and_removed_once_it_is_idle() -> None:
    async with running({"solver": (1, 2)}) as made:
        assert states(made, "solver") == [EngineState.READY, EngineState.ABSENT]
        results = await work(made)
        assert all(result.correct for result in results)
        (added,) = made.rebalancer.changes
        assert (added.added, added.removed, added.error) == ("solver@1", None, None)
        assert "requests" in added.reason
        assert made.engines["solver@1"].stats().requests > 0
        await asyncio.sleep(2 * IDLE_S)
        (_, removed) = made.rebalancer.changes
        assert removed.added is None
        assert sorted(states(made, "solver")) == [EngineState.ABSENT, EngineState.READY]
        assert removed.removed is not None
        assert made.devices[device_of(removed.removed)].sharing.ledger.held[removed.removed] == 0
        assert all(result.correct for result in await work(made, 20))


async def test_an_engine_moves_away_from_a_busy_device() -> None:
    async with running({"solver": (1, 1)}) as made:
        working = asyncio.create_task(work(made))
        streams = [asyncio.create_task(_keep_asking(made)) for _ in range(30)]
        async with asyncio.timeout(600):
            while not made.rebalancer.changes:  # noqa: ASYNC110 (there is no event to wait for)
                await asyncio.sleep(0.1)
        assert [(change.added, change.removed) for change in made.rebalancer.changes] == [("solver@1", "solver@0")]
        assert states(made, "solver") == [EngineState.ABSENT, EngineState.READY]
        assert all(result.correct for result in await working)
        for stream in streams:
            stream.cancel()
        await asyncio.wait(streams)


async def _keep_asking(made: RunningTeam) -> None:
    """Keep the planner of device 0 busy."""
    while True:
        async for _ in made.generate("planner", GenerateRequest("busy", (Message("user", PROBLEM),), 0.0, 1.0, 100)):
            pass


async def test_a_replica_that_does_not_start_is_not_tried_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running({"solver": (1, 2)}) as made:
        tries = 0

        async def fail() -> None:
            nonlocal tries
            tries += 1
            raise EngineError("no driver")

        monkeypatch.setattr(made.engines["solver@1"], "wake", fail)
        results = await work(made)
        assert all(result.correct for result in results)
        assert 1 <= tries <= 3
        assert made.rebalancer.changes[0].error == "no driver"
        assert made.devices["1"].sharing.ledger.held["solver@1"] == 0


async def test_requests_of_a_replica_that_leaves_are_served_by_another_one() -> None:
    async with running({}) as made:
        await made.devices["1"].add("solver@1")
        working = asyncio.create_task(work(made, 100))
        async with asyncio.timeout(600):
            while not made.engines["solver@0"].stats().running:  # noqa: ASYNC110 (there is no event to wait for)
                await asyncio.sleep(0.01)
        await made.devices["0"].remove("solver@0")
        assert states(made, "solver") == [EngineState.ABSENT, EngineState.READY]
        assert all(result.correct for result in await working)


async def test_changes_are_written_to_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    async with running({"solver": (1, 2)}) as made:
        made.rebalancer._log = tmp_path / "placements.jsonl"
        await work(made)
    (line,) = [json.loads(line) for line in (tmp_path / "placements.jsonl").read_text().splitlines()]
    assert line["added"] == "solver@1"
    assert line["seconds"] >= 0
