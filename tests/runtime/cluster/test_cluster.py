"""A head and agents over modelled engines: nodes die, freeze, come back and join while jobs run."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime import config
from runtime.assembly import RunningTeam, engine_requirements
from runtime.cluster.cluster import Cluster
from runtime.cluster.plan import Common, Timeouts
from runtime.control.contained_policy import ContainedPolicies
from runtime.engines.handle import EngineState
from runtime.engines.replicas import device_of
from runtime.engines.spec import ReplicaRange
from runtime.errors import ConfigError, EngineError
from runtime.jobs.batch import work_all
from runtime.jobs.job import Job, JobResult
from runtime.simulation.modelled_agent import modelled_agent
from tests.runtime.cluster.nodes import LocalNodes
from tests.runtime.fakes import embedded_team

pytestmark = pytest.mark.virtual_time
PROBLEM = "(12+7)*3-(45-5)"
SLOW: Callable[..., Any] = partial(modelled_agent, time_scale=20)


@asynccontextmanager
async def cluster(
    nodes: LocalNodes, folder: Path, replicas: Mapping[str, Any] | None = None, timeouts: Timeouts | None = None
) -> AsyncIterator[Cluster]:
    found = config.load("embedded")
    specs = {
        name: spec.model_copy(update={"replicas": (replicas or {}).get(name, 1)})
        for name, spec in found.engines.items()
    }
    common = Common.of(found, specs, (), engine_requirements(embedded_team()), timeouts or Timeouts())
    states: list[tuple[str, EngineState]] = []
    async with Cluster(nodes, found, common, folder, lambda name, state, _: states.append((name, state))) as made:
        made.states = states  # type: ignore[attr-defined]
        yield made


@asynccontextmanager
async def running(made: Cluster) -> AsyncIterator[RunningTeam]:
    """Run the embedded team on a cluster, as start_team does."""
    found = config.load("embedded")
    specs = made._common.specs
    async with AsyncExitStack() as owned:
        policies = owned.enter_context(ContainedPolicies(found.control.policy))
        bounds = {name: spec.replica_bounds(len(made.devices)) for name, spec in specs.items()}
        team = RunningTeam(
            embedded_team(), made.devices, found.control, policies, replica_bounds=bounds, more_devices_come=True
        )
        await owned.enter_async_context(team)
        made.on_device = lambda device: team.add_device(device.name, device)
        yield team


async def work(team: RunningTeam, count: int = 200, at_once: int = 50) -> list[JobResult]:
    results: list[JobResult] = []
    jobs = [Job(str(number), PROBLEM, expected="17") for number in range(count)]
    await work_all(team.orchestrator, jobs, at_once, results.append)
    return results


def assert_right(results: list[JobResult], count: int) -> None:
    assert {result.error for result in results} == {None}
    assert [result.correct for result in results] == [True] * count
    assert len({result.id for result in results}) == count


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  the condition is about state, which has no event
            await asyncio.sleep(0.05)


def ready(team: RunningTeam, engine: str) -> set[str]:
    return {
        device_of(name)
        for name, each in team.engines.items()
        if name.startswith(f"{engine}@") and each.state is EngineState.READY
    }


async def test_jobs_run_on_the_engines_of_two_nodes(tmp_path: Path) -> None:
    nodes = LocalNodes("a", "b")
    async with cluster(nodes, tmp_path, {"solver": 2}) as made, running(made) as team:
        assert sorted(made.devices) == ["a:0", "b:0"]
        assert ready(team, "solver") == {"a:0", "b:0"}
        results = await work(team)
        assert_right(results, 200)
        assert all(team.engines[f"solver@{node}:0"].usage.finished > 50 for node in "ab")
        await asyncio.sleep(1)
        assert all(each.usage.in_flight == 0 for each in team.engines.values())
        on_agents = [
            engine.usage.in_flight
            for each in nodes.agents.values()
            for d in each.agent._devices.values()
            for engine in d.engines.values()
        ]
        assert sum(on_agents) == 0
        assert all(result.usage["solver"].byte_seconds > 0 for result in results)


async def test_a_killed_agent_loses_no_job_and_its_engines_start_elsewhere(tmp_path: Path) -> None:
    nodes = LocalNodes("a", "b", make=SLOW)
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        (where,) = ready(team, "solver")
        working = asyncio.create_task(work(team))
        await until(lambda: team.engines[f"solver@{where}"].usage.in_flight > 10)
        nodes.agents[where[0]].kill()
        nodes.names.remove(where[0])
        await until(lambda: bool(ready(team, "solver") - {where}))
        results = await working
        assert_right(results, 200)
        assert team.devices[where].lost
        assert team.engines[f"solver@{where}"].state is EngineState.LOST


async def test_a_killed_agent_is_replaced_on_its_node(tmp_path: Path) -> None:
    nodes = LocalNodes("a", make=SLOW)
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        working = asyncio.create_task(work(team))
        await until(lambda: team.engines["solver@a:0"].usage.in_flight > 10)
        nodes.agents["a"].kill()
        results = await working
        assert_right(results, 200)
        assert ready(team, "solver") == {"a:0"}


async def test_a_pin_outlives_the_agent_of_its_node(tmp_path: Path) -> None:
    nodes = LocalNodes("a")
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        await work(team, 5)
        controller = team.controllers.of("solver@a:0")
        pinned = controller.current_grant("solver@a:0")
        controller.pin("solver@a:0", pinned)
        nodes.agents["a"].kill()
        killed = nodes.agents["a"]
        await until(lambda: nodes.agents["a"] is not killed and ready(team, "solver") == {"a:0"})
        await asyncio.sleep(2)
        assert nodes.agents["a"].agent._devices["a:0"].controller.pinned == {"solver@a:0": pinned}
        assert controller.pinned == {"solver@a:0": pinned}
        assert team.engines["solver@a:0"].stats().grant == pinned


async def test_a_frozen_node_is_replaced_and_rejoins_without_its_calls(tmp_path: Path) -> None:
    nodes = LocalNodes("a", "b", make=SLOW)
    async with cluster(nodes, tmp_path, {"planner": 2, "solver": 2, "critic": 2}) as made, running(made) as team:
        working = asyncio.create_task(work(team))
        await until(lambda: team.engines["solver@a:0"].usage.in_flight > 10)
        nodes.agents["a"].thawed.clear()
        began_s = asyncio.get_running_loop().time()
        await until(lambda: team.devices["a:0"].lost)
        assert asyncio.get_running_loop().time() - began_s < 1.3
        await asyncio.sleep(10)
        nodes.agents["a"].thawed.set()
        await until(lambda: not team.devices["a:0"].lost)
        results = await working
        assert_right(results, 200)
        assert len({result.id for result in results}) == 200
        assert nodes.agents["a"].agent._epoch == 2
        assert ready(team, "solver") == {"a:0", "b:0"}


async def test_a_node_that_joins_gets_replicas_where_there_is_work(tmp_path: Path) -> None:
    nodes = LocalNodes("a", make=SLOW)
    async with cluster(nodes, tmp_path, {"solver": ReplicaRange(min=1, max=2)}) as made, running(made) as team:
        team.rebalancer.bounds["solver"] = (1, 2)
        nodes.names.append("b")
        await until(lambda: "b:0" in team.devices)
        assert team.engines["solver@b:0"].state is EngineState.ABSENT
        results = await work(team, 600, 100)
        assert_right(results, 600)
        assert team.engines["solver@b:0"].usage.finished > 10


async def test_a_head_that_comes_back_finds_its_engines_as_they_were(tmp_path: Path) -> None:
    nodes = LocalNodes("a", "b", make=SLOW)
    async with cluster(nodes, tmp_path, {"solver": 2}) as dead, running(dead) as team:
        working = asyncio.create_task(work(team))
        await until(lambda: team.engines["solver@a:0"].usage.in_flight > 10)
        dead._watching.cancel()
        for member in dead._members.values():  # what a kill -9 leaves behind: nothing is said any more
            member.link._cancel()
            member.link._send = lambda messages: None  # type: ignore[method-assign]
        started = [engine.stats().requests for engine in _engines(nodes)]
        dead._owned.pop_all()
        async with cluster(nodes, tmp_path, {"solver": 2}) as made, running(made) as again:
            assert sum(engine.usage.in_flight for engine in _engines(nodes)) == 0
            assert ready(again, "solver") == {"a:0", "b:0"}
            assert [engine.stats().requests for engine in _engines(nodes)] == started  # none was restarted
            results = await work(again, 50)
            assert_right(results, 50)
        working.cancel()


async def test_a_second_head_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    nodes = LocalNodes("a")
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        with pytest.raises(EngineError, match=r"serves another head, .*process \d+"):
            async with cluster(nodes, tmp_path):
                pass
        assert_right(await work(team, 20), 20)


async def test_an_agent_ends_when_no_head_comes(tmp_path: Path) -> None:
    ended = asyncio.Event()
    nodes = LocalNodes("a", make=lambda name: modelled_agent(name, ended.set))
    async with cluster(nodes, tmp_path, timeouts=Timeouts(1, 20)) as made:
        made._watching.cancel()
        for member in made._members.values():
            member.link._cancel()
        began_s = asyncio.get_running_loop().time()
        await ended.wait()
        assert 19 < asyncio.get_running_loop().time() - began_s < 23
        made._owned.pop_all()


async def test_engines_that_do_not_fit_are_refused_and_agents_end(tmp_path: Path) -> None:
    nodes = LocalNodes("a")
    with pytest.raises(ConfigError, match="2 replicas need as many devices"):
        async with cluster(nodes, tmp_path, {"solver": 2}):
            pass
    assert nodes.agents["a"].dead.is_set()


async def test_pins_pauses_and_policies_reach_the_agent(tmp_path: Path) -> None:
    nodes = LocalNodes("a")
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        await work(team, 20)
        controller = team.controllers.of("solver@a:0")
        on_agent = nodes.agents["a"].agent._devices["a:0"].controller
        controller.pin("solver@a:0", controller.current_grant("solver@a:0"))
        await until(lambda: "solver@a:0" in on_agent.pinned)
        controller.unpin("solver@a:0")
        await until(lambda: not on_agent.pinned)
        team.controllers.pause()
        await until(lambda: on_agent.paused)
        team.controllers.resume()
        await until(lambda: not on_agent.paused)
        team.controllers.use(config.PolicyChoice(name="static"))
        await until(lambda: on_agent.policy == "static")
        assert team.controllers.policy == "static"
        assert team.controllers.counts.decisions > 0
        assert team.controllers.snapshots["a:0"].engines.keys() == {"planner@a:0", "solver@a:0", "critic@a:0"}


def _engines(nodes: LocalNodes) -> list[Any]:
    return [
        engine
        for each in nodes.agents.values()
        for device in each.agent._devices.values()
        for engine in device.engines.values()
    ]
