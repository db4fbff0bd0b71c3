"""A team whose engines have replicas on several modelled devices works as on one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace

import pytest

from agents.role import Message
from runtime import config
from runtime.assembly import RunningTeam
from runtime.config import PolicyChoice
from runtime.control.costs import StepCost
from runtime.control.decision_log import Record
from runtime.devices.routing import Router
from runtime.engines.grant import Grant
from runtime.engines.replicas import Home, device_of
from runtime.engines.request import GenerateRequest
from runtime.errors import ConfigError, InputError, NotFound
from runtime.events import Event
from runtime.jobs.batch import work_all
from runtime.jobs.job import Job, JobResult
from runtime.jobs.orchestrator import Orchestrator
from runtime.simulation.assembly import start_modelled_team
from tests.runtime.fakes import embedded_team

pytestmark = pytest.mark.virtual_time
PROBLEM = "(12+7)*3-(45-5)"


@asynccontextmanager
async def running(devices: int = 2, records: list[Record] | None = None) -> AsyncIterator[RunningTeam]:
    def publish(record: Record) -> None:
        if records is not None:
            records.append(record)

    found = config.load("embedded")
    team = embedded_team()
    async with start_modelled_team(found, team, lambda event: None, publish, 1, devices=devices) as made:
        yield made


async def work(orchestrator: Orchestrator, count: int = 40) -> list[JobResult]:
    results: list[JobResult] = []
    await work_all(orchestrator, [Job(str(n), PROBLEM, expected="17") for n in range(count)], count, results.append)
    return results


async def test_jobs_use_the_replicas_of_all_devices() -> None:
    async with running() as made:
        results = await work(made.orchestrator)
        assert all(result.correct for result in results)
        assert {*made.engines} == {f"{engine}@{n}" for engine in ("planner", "solver", "critic") for n in (0, 1)}
        for engine in ("planner", "solver", "critic"):
            served = [made.engines[f"{engine}@{n}"].stats().requests for n in (0, 1)]
            assert min(served) > 0.3 * sum(served)


async def test_each_device_is_controlled_within_its_own_budget() -> None:
    records: list[Record] = []
    async with running(records=records) as made:
        await work(made.orchestrator, 200)
        assert {record.device for record in records} == {"0", "1"}
        for record in records:
            assert {name.partition("@")[2] for name in record.snapshot.engines} == {record.device}
        for device in made.devices.values():
            assert sum(device.sharing.ledger.held.values()) <= device.sharing.ledger.budget_bytes
        assert made.controllers.counts.decisions - len(records) in (0, 1, 2)  # each device may carry one out
        assert made.controllers.counts.resizes > 0


async def test_two_devices_work_faster_than_one() -> None:
    """They share the modelled process that sends the requests, so that they are not twice as fast."""
    seconds = []
    for devices in (1, 2):
        async with running(devices) as made:
            began_s = asyncio.get_running_loop().time()
            await work(made.orchestrator, 500)
            seconds.append(asyncio.get_running_loop().time() - began_s)
    assert seconds[0] / seconds[1] > 1.3


async def test_a_pin_holds_the_replica_of_one_device() -> None:
    async with running() as made:
        await asyncio.sleep(0.5)
        controller = made.controllers.of("solver@1")
        grant = replace(controller.current_grant("solver@1"), max_active_seqs=3)
        controller.pin("solver@1", grant)
        await asyncio.sleep(0.5)
        assert made.controllers.pinned == {"solver@1": grant}
        assert seqs(made, "solver@1") == 3
        assert seqs(made, "solver@0") > 3
        controller.unpin("solver@1")
        assert made.controllers.pinned == {}


def seqs(made: RunningTeam, name: str) -> int:
    grant = made.engines[name].stats().grant
    assert isinstance(grant, Grant)
    return grant.max_active_seqs


async def test_an_unknown_replica_is_refused_with_those_that_exist() -> None:
    async with running() as made:
        with pytest.raises(NotFound, match=r"no engine 'solver'; the engines are planner@0, solver@0, critic@0, plann"):
            made.controllers.of("solver")


async def test_a_policy_and_a_pause_apply_to_all_devices() -> None:
    async with running() as made:
        made.controllers.use(PolicyChoice(name="static"))
        assert {device.controller.policy for device in made.devices.values()} == {"static"}
        with pytest.raises(ConfigError, match="no policy is named"):
            made.controllers.use(PolicyChoice(name="no such policy"))
        assert made.controllers.policy == "static"
        made.controllers.pause()
        assert made.controllers.paused
        assert all(device.controller.paused for device in made.devices.values())
        made.controllers.resume()
        assert not made.controllers.paused


async def test_a_pin_that_does_not_fit_its_device_is_refused() -> None:
    async with running() as made:
        await asyncio.sleep(0.5)
        controller = made.controllers.of("solver@1")
        with pytest.raises(InputError, match="solver@1"):
            controller.pin("solver@1", replace(controller.current_grant("solver@1"), gpu_memory_utilization=1.0))


async def test_events_reach_the_listener_once_whatever_the_number_of_devices() -> None:
    events: list[Event] = []
    found = config.load("embedded")
    async with start_modelled_team(found, embedded_team(), events.append, time_scale=1, devices=3) as made:
        await work(made.orchestrator, 1)
        ended = [event for event in events if type(event).__name__ == "JobEnded"]
        assert len(ended) == 1
        assert made.expect_job() == 0


async def test_a_round_has_a_step_of_each_engine_with_requests() -> None:
    async with running() as made:
        await asyncio.sleep(0.5)
        router = Router(made.devices)
        step_s = {name: cost(made, name).step_s for name in made.engines}
        assert router.round_s("solver@0") == pytest.approx(step_s["solver@0"] + cost(made, "solver@0").sequence_s)
        with ExitStack() as requests:
            for _ in range(10):
                requests.enter_context(made.engines["planner@0"].usage.request(0))
            assert router.round_s("solver@0") > router.round_s("solver@1")  # the planner's steps come between
            for _ in range(3):
                requests.enter_context(made.engines["solver@1"].usage.request(0))
            joined, begun = router.round_s("solver@1"), router.round_s("critic@1")
            assert begun - joined > 0.9 * step_s["critic@1"] - cost(made, "solver@1").sequence_s


async def test_a_request_goes_where_the_fewest_steps_of_other_engines_come_between() -> None:
    async with running() as made:
        await asyncio.sleep(0.5)
        router = Router(made.devices)
        solvers = [made.engines["solver@0"], made.engines["solver@1"]]
        assert router(solvers) is solvers[0]
        with ExitStack() as requests:
            for name in ("planner@0", "solver@1", "solver@1"):
                requests.enter_context(made.engines[name].usage.request(0))
            assert router(solvers) is solvers[1]  # on the other device, the planner's steps would come between
            for _ in range(100):
                requests.enter_context(made.engines["critic@1"].usage.request(0))
            assert router(solvers) is solvers[0]


async def test_a_session_stays_while_a_prompt_costs_more_than_the_wait() -> None:
    async with running() as made:
        await work(made.orchestrator, 20)
        router = Router(made.devices)
        here, there = made.engines["solver@0"], made.engines["solver@1"]
        snapshot = made.controllers.snapshots["0"]
        view = snapshot.engines["solver@0"]
        view = replace(view, cost=replace(view.cost, prompt_token_s=1e-4))
        made.devices["0"].controller.snapshot = replace(snapshot, engines={**snapshot.engines, "solver@0": view})  # type: ignore[misc]
        assert view.reply_tokens > 1
        with ExitStack() as requests:
            for _ in range(10):
                requests.enter_context(made.engines["planner@0"].usage.request(0))
            longer_s = (router.round_s("solver@0") - router.round_s("solver@1")) * view.reply_tokens
            worth = longer_s / view.cost.prompt_token_s
            assert router([here, there]) is there
            assert router([here, there], Home(here, int(worth * 1.1) + 1)) is here
            assert router([here, there], Home(here, int(worth * 0.9))) is there
            assert router([there], Home(here, 10**9)) is there  # the other one is not ready


async def test_the_calls_of_a_session_go_to_one_replica() -> None:
    async with running() as made:
        await work(made.orchestrator, 20)
        long = "x " * 3000
        before = [made.engines[f"solver@{number}"].usage.finished for number in (0, 1)]
        for turn in range(6):
            request = GenerateRequest(str(turn), (Message("user", long),), 0.0, 1.0, 8, session="one")
            async for _ in made.generate("solver", request):
                pass
        served = [made.engines[f"solver@{number}"].usage.finished - before[number] for number in (0, 1)]
        assert sorted(served) == [0, 6]


def cost(made: RunningTeam, name: str) -> StepCost:
    return made.controllers.snapshots[device_of(name)].engines[name].cost
