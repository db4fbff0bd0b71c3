"""A cluster on real Ray, over modelled engines: its nodes are killed and frozen while jobs run."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio

from runtime.assembly import RunningTeam, start_team
from runtime.engines.handle import EngineState
from runtime.jobs.job import Job, JobResult
from runtime.jobs.team import assemble
from runtime.simulation.modelled_agent import modelled_agent
from scripts.ray_machines import NODE, Machines, on_cluster
from tests.e2e.conftest import LONG_S, Command

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

PROBLEM = "(12+7)*3-(45-5)"
PATIENT_S = 5.0
"""A busy machine can hold a process up for seconds, which is no loss."""


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with Machines("a", "b") as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(machines: Machines, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningTeam]:
    """A team with modelled engines on both nodes, which take eight times as long as real ones."""
    found = on_cluster(machines.address, lost_s=PATIENT_S)
    folder = tmp_path_factory.mktemp("run")
    async with start_team(found, assemble(found), folder, make_agent=partial(modelled_agent, time_scale=8)) as team:
        yield team


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG_S):
        while not holds():  # noqa: ASYNC110  the condition is about state, which has no event
            await asyncio.sleep(0.05)


async def work(running: RunningTeam, count: int) -> list[JobResult]:
    jobs = [Job(str(number), PROBLEM, expected="17") for number in range(count)]
    return await asyncio.gather(*(running.orchestrator.run(job) for job in jobs))


async def lose(running: RunningTeam, act: Callable[[], None]) -> None:
    """Lose node `a` while it has calls of jobs. All jobs must end, with the right answers."""
    await until(lambda: all(engine.is_ready for engine in running.engines.values()))
    working = asyncio.create_task(work(running, 60))
    await until(lambda: running.engines["solver@a:0"].usage.in_flight > 5)
    act()
    await until(lambda: running.devices["a:0"].lost)
    assert running.engines["solver@a:0"].state is EngineState.LOST
    results = await working
    assert {result.error for result in results} == {None}
    assert [result.answer for result in results] == ["17"] * 60


async def test_jobs_run_on_both_nodes(running: RunningTeam) -> None:
    assert sorted(running.devices) == ["a:0", "b:0"]
    assert [result.correct for result in await work(running, 40)] == [True] * 40
    for node in "ab":
        assert running.engines[f"solver@{node}:0"].usage.finished > 0
    await until(lambda: all(running.controllers.snapshots.get(f"{node}:0") is not None for node in "ab"))


async def test_a_killed_agent_is_replaced(running: RunningTeam, machines: Machines) -> None:
    [agent] = machines.agents("a")
    await lose(running, agent.kill)
    await until(lambda: running.engines["solver@a:0"].is_ready)
    assert machines.agents("a") != [agent]


async def test_a_killed_node_is_replaced_by_one_with_its_name(
    running: RunningTeam, machines: Machines, capfd: pytest.CaptureFixture[str]
) -> None:
    await lose(running, partial(machines.send, "a", signal.SIGKILL))
    machines.forget("a")
    machines.add("a")
    await until(lambda: running.engines["solver@a:0"].is_ready)
    await asyncio.sleep(10)  # by then Ray knows, too
    assert "raylet" not in "".join(capfd.readouterr())  # a command's output is for its reader


async def test_a_frozen_node_rejoins_with_its_engines(running: RunningTeam, machines: Machines) -> None:
    agents = machines.agents("a")
    await lose(running, partial(machines.send, "a", signal.SIGSTOP))
    machines.send("a", signal.SIGCONT)
    await until(lambda: not running.devices["a:0"].lost)
    assert machines.agents("a") == agents
    assert [result.correct for result in await work(running, 40)] == [True] * 40


async def test_a_second_team_in_the_namespace_is_refused(
    machines: Machines, running: RunningTeam, tmp_path: Path
) -> None:
    # Ray connects once in a process, so that the second head is a command.
    command = Command(tmp_path)
    (tmp_path / "second.yaml").write_text(
        f"extends: embedded\ncluster: {{address: '{machines.address}', nodes_with: {NODE}}}\n"
    )
    second = await asyncio.to_thread(command.run, "solve", PROBLEM, "--config", "second.yaml")
    assert second.returncode == 2
    assert "serves another head" in second.stderr
    assert "cluster.namespace" in second.stderr
    assert [result.correct for result in await work(running, 10)] == [True] * 10
    command.nothing_left()


async def test_a_cluster_that_does_not_exist_is_named(tmp_path: Path) -> None:
    command = Command(tmp_path)
    (tmp_path / "wrong.yaml").write_text("extends: embedded\ncluster: {address: '127.0.0.1:1'}\n")
    wrong = await asyncio.to_thread(command.run, "solve", PROBLEM, "--config", "wrong.yaml")
    assert wrong.returncode == 2
    assert "cluster.address: the Ray cluster '127.0.0.1:1' cannot be used" in wrong.stderr
