"""Real engines have replicas on two emulated devices, and one of them is killed while jobs run."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from runtime import config
from runtime.assembly import RunningTeam, start_team
from runtime.config import Config
from runtime.engines import sharing
from runtime.engines.handle import EngineState
from runtime.errors import EngineError
from runtime.jobs.job import Job, JobResult
from runtime.jobs.team import assemble
from scripts.drill_residency import processes
from tests.e2e.conftest import LONG_S

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

DEVICES = """
extends: embedded
devices: [0, 1]
device: {{memory_bytes: {size}}}
engines:
  solver: {{replicas: all}}
  planner: {{replicas: {{min: 1, max: 2}}}}
workflow: {{name: deliberate}}
"""


def load(folder: Path, size: str) -> Config:
    file = folder / "team.yaml"
    file.write_text(DEVICES.format(size=size))
    return config.load(str(file))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningTeam]:
    folder = tmp_path_factory.mktemp("run")
    found = load(folder, "2GiB")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "ANSWER_S", 60)  # on a busy machine an engine answers late
        async with start_team(found, assemble(found), folder) as team:
            yield team


async def work(running: RunningTeam, count: int) -> list[JobResult]:
    problem = "(12+7)*3-(45-5)"
    jobs = [Job(str(number), problem, expected="17") for number in range(count)]
    return await asyncio.gather(*(running.orchestrator.run(job) for job in jobs))


async def test_a_device_whose_engines_do_not_start_closes_the_others(tmp_path: Path) -> None:
    found = load(tmp_path, "120MiB")
    with pytest.raises(EngineError, match="did not start: it does not fit the device even alone"):
        async with start_team(found, assemble(found), tmp_path):
            pass
    assert processes() == []


async def test_replicas_of_both_devices_work(running: RunningTeam) -> None:
    assert {name: [*device.engines] for name, device in running.devices.items()} == {
        "0": ["planner@0", "solver@0"],
        "1": ["solver@1", "critic@1", "planner@1"],
    }
    assert running.engines["planner@1"].stats().state is EngineState.ABSENT
    assert all(result.correct for result in await work(running, 20))
    assert all(running.engines[name].stats().requests > 0 for name in ("solver@0", "solver@1"))
    for device in running.devices.values():
        ledger = device.sharing.ledger
        assert ledger.budget_bytes <= 2 << 30
        assert 0 < sum(ledger.held.values()) <= ledger.budget_bytes


async def test_a_killed_replica_costs_no_job(running: RunningTeam) -> None:
    working = asyncio.create_task(work(running, 40))
    pids = []
    for name in ("solver@0", "solver@1"):  # not three: a request that was alone at three kills would be refused
        await asyncio.sleep(0.3)
        async with asyncio.timeout(LONG_S):
            while (pid := running.engines[name].stats().pid) is None or pid in pids:  # noqa: ASYNC110  no event
                await asyncio.sleep(0.05)
        pids.append(pid)
        psutil.Process(pid).kill()
    results = await working
    assert [result.error for result in results if result.error] == []
    assert all(result.correct for result in results)


async def test_a_replica_moves_to_another_device_while_jobs_run(running: RunningTeam) -> None:
    working = asyncio.create_task(work(running, 40))
    await running.devices["1"].add("planner@1")
    await running.devices["0"].remove("planner@0")
    assert running.engines["planner@0"].stats().state is EngineState.ABSENT
    assert running.engines["planner@0"].stats().pid is None
    assert running.devices["0"].sharing.ledger.held["planner@0"] == 0
    async with asyncio.timeout(LONG_S):  # a new process measures itself a little larger; then the others shrink
        while any(device.sharing.ledger.free < 0 for device in running.devices.values()):  # noqa: ASYNC110  no event
            await asyncio.sleep(0.01)
    assert all(result.correct for result in await working)
    assert all(result.correct for result in await work(running, 5))
    assert running.engines["planner@1"].stats().requests >= 5
