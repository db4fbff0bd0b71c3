"""Running jobs on fake engines: results, failures, concurrency, and what each call costs."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace

import pytest

from agents.arithmetic import oracle
from agents.arithmetic.roles import ArithmeticCritic, ArithmeticPlanner
from agents.role import Message, Reply, Task, Value
from agents.tasks import PlanTask
from agents.workflow import RoleCall, Unusable, Workflow
from runtime.control.forecast import Forecast
from runtime.engines import replicas
from runtime.engines.fake import FakeEngine
from runtime.engines.request import Chunk, GenerateRequest
from runtime.events import CallEnded, Event, JobAdvanced, JobEnded, RoleReplied
from runtime.jobs.job import Job
from runtime.jobs.orchestrator import Orchestrator
from tests.runtime.fakes import embedded_team, engines, slip_in_the_units

pytestmark = pytest.mark.virtual_time

PROBLEM = "(12+7)*3-(45-5)"


async def test_job_returns_answer_steps_and_usage() -> None:
    events: list[Event] = []
    result = await Orchestrator(embedded_team(), await engines(), events.append).run(Job("j", PROBLEM, expected="17"))
    assert (result.answer, result.confirmed, result.correct, result.error) == ("17", True, True, None)
    assert [(e.seat, e.output) for e in result.steps if e.seat != "critic"] == [
        ("planner", "A=12+7; B=A*3; C=45-5; D=B-C"),
        ("solver", "19"),
        ("solver", "40"),
        ("solver", "57"),
        ("solver", "17"),
    ]
    assert {seat: usage.completion_tokens > 0 for seat, usage in result.usage.items()} == dict.fromkeys(
        ("planner", "solver", "critic"), True
    )
    assert sum(isinstance(event, RoleReplied) for event in events) == len(result.steps) == 9
    assert isinstance(events[-1], JobEnded)


@pytest.mark.parametrize("workflow", ["deliberate", "vote", "solo"])
async def test_calls_announced_ahead_are_the_calls_made(workflow: str) -> None:
    events: list[Event] = []
    team = embedded_team(workflow)
    await Orchestrator(team, await engines(), events.append).run(Job("j", "12+7" if workflow == "solo" else PROBLEM))
    advanced = [event for event in events if isinstance(event, JobAdvanced)]
    known = 0
    for place, event in enumerate(advanced):
        if event.ahead is None:
            continue
        later: Counter[str] = Counter()
        for after in advanced[place + 1 :]:
            later.update(after.due)
        # The solver makes no errors, so the critic of a vote judges one distinct result for each step.
        assert +Counter(event.ahead) == +later, (place, event)
        known += 1
    assert known > 0
    assert sum(sum(event.due.values()) for event in advanced) == sum(isinstance(e, CallEnded) for e in events)


async def test_call_is_reported_with_times_and_charged() -> None:
    events: list[Event] = []
    handles = await engines(time_scale=1)
    orchestrator = Orchestrator(embedded_team(), replicas.gathered(handles), events.append, price=3600.0)
    result = await orchestrator.run(Job("j", PROBLEM))
    calls = [event for event in events if isinstance(event, CallEnded)]
    for call in calls:
        assert call.asked_s <= call.chunk_times_s[0]
        assert list(call.chunk_times_s) == sorted(call.chunk_times_s)
        assert sum(call.chunk_tokens) > 0
    for seat, used in result.usage.items():
        assert used.completion_tokens == sum(sum(call.chunk_tokens) for call in calls if call.seat == seat)
        assert 0 < used.engine_seconds <= used.seconds + 1e-6
        # Each fake engine holds the whole device, which costs 3,600 an hour, or 1 a second.
        assert used.cost == pytest.approx(used.engine_seconds)
        assert used.byte_seconds == pytest.approx(used.engine_seconds * handles[seat].limits.device_bytes)
    assert result.as_json()["usage"]["solver"]["cost"] > 0


async def test_requests_carry_the_start_and_priority_of_their_job() -> None:
    asked: list[GenerateRequest] = []

    class Recording(FakeEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            asked.append(request)
            async for chunk in super().generate(request):
                yield chunk

    handles = {
        name: Recording(name, lambda r: oracle.reply(r.messages[-1].content), time_scale=1)
        for name in ("planner", "solver", "critic")
    }
    for handle in handles.values():
        await handle.start()
    await asyncio.sleep(1)
    began_s = asyncio.get_running_loop().time()
    await Orchestrator(embedded_team(), handles).run(Job("j", PROBLEM, priority=3))
    assert asyncio.get_running_loop().time() > began_s
    assert {request.since_s for request in asked} == {began_s}
    assert {request.priority for request in asked} == {3}


async def test_usage_has_no_cost_without_a_price() -> None:
    result = await Orchestrator(embedded_team(), await engines()).run(Job("j", PROBLEM))
    assert {used.cost for used in result.usage.values()} == {None}


async def test_most_common_of_several_plans_is_followed() -> None:
    handles = await engines()
    team = embedded_team()
    team = replace(team, options=team.options.model_copy(update={"plans": 5}))
    result = await Orchestrator(team, handles).run(Job("j", PROBLEM, expected="17"))
    assert result.correct
    assert handles["planner"].stats().requests == 5


async def test_independent_steps_run_at_the_same_time() -> None:
    handles = await engines(time_scale=1)
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, handles["solver"].stats().running)
            await asyncio.sleep(0.001)

    watcher = asyncio.create_task(watch())
    await Orchestrator(embedded_team(), handles).run(Job("j", PROBLEM))
    watcher.cancel()
    assert most == 2


@pytest.mark.parametrize("workflow", ["deliberate", "vote"])
async def test_team_corrects_errors_of_its_solver(workflow: str) -> None:
    orchestrator = Orchestrator(embedded_team(workflow), await engines(slip_in_the_units(0.3)))
    results = [await orchestrator.run(Job(str(n), f"{n}+7*3-2", str(n + 19), temperature=1.0)) for n in range(200)]
    right = sum(bool(result.correct) for result in results)
    assert right >= 180  # of the three steps, 0.3 ** 3 find no right result in three tries
    assert any(entry.verdict == "rejected" for result in results for entry in result.steps)


async def test_team_without_critics_keeps_errors() -> None:
    team = embedded_team()
    unchecked = replace(team, options=team.options.model_copy(update={"critics": ()}))
    orchestrator = Orchestrator(unchecked, await engines(slip_in_the_units(0.3)))
    results = [await orchestrator.run(Job(str(n), f"{n}+7*3-2", str(n + 19), temperature=1.0)) for n in range(50)]
    assert sum(bool(result.correct) for result in results) < 40


async def test_answer_that_is_always_wrong_ends_unconfirmed_after_three_rounds() -> None:
    result = await Orchestrator(embedded_team(), await engines(slip_in_the_units(1.0))).run(Job("j", "12+7"))
    assert (result.answer, result.confirmed, result.rounds) == ("10", False, 3)


async def test_concurrent_jobs_do_not_change_a_seeded_result() -> None:
    orchestrator = Orchestrator(embedded_team(), await engines(slip_in_the_units(0.5)))
    job = Job("j", PROBLEM, temperature=1.0, seed=7)
    alone = await orchestrator.run(job)
    crowd = await asyncio.gather(*(orchestrator.run(Job(str(n), PROBLEM, temperature=1.0, seed=n)) for n in range(20)))
    assert [e.output for e in crowd[7].steps] == [e.output for e in alone.steps]
    assert len({str([e.output for e in result.steps]) for result in crowd}) > 1


async def test_role_that_raises_fails_its_job() -> None:
    class Broken(ArithmeticCritic):
        def messages(self, task: Task) -> list[Message]:
            raise KeyError("a defect")

    team = embedded_team()
    seats = {**team.seats, "critic": replace(team.seats["critic"], role=Broken())}
    result = await Orchestrator(replace(team, seats=seats), await engines()).run(Job("j", "1+2"))
    assert "the role at critic: messages() raised KeyError('a defect')" in str(result.error)


class Mute(Workflow):
    """A workflow that asks for no call and has no outcome."""

    @classmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[Task], ...]]:
        return {}

    def begin(self) -> list[RoleCall]:
        return []

    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        return []


class Stranger(Mute):
    """A workflow that calls on a seat that the team does not have."""

    def begin(self) -> list[RoleCall]:
        return [RoleCall(1, "stranger", PlanTask(self.problem))]


class Seer(Mute):
    """A workflow that is certain to call on a seat that the team does not have."""

    def begin(self) -> list[RoleCall]:
        return [RoleCall(1, "planner", PlanTask(self.problem))]

    def ahead(self) -> Mapping[str, int]:
        return {"stranger": 1}


class Vague(Seer):
    """A workflow that does not count its calls."""

    def ahead(self) -> Mapping[str, int]:
        return {"planner": "several"}  # type: ignore[dict-item]  # on purpose


class Unmade(Mute):
    """A workflow whose constructor raises."""

    def __init__(self, problem: str, options: Value) -> None:
        raise RuntimeError("a defect")


@pytest.mark.parametrize(
    ("workflow", "error"),
    [
        (Mute, "asks for no call"),
        (Stranger, "calls on the seat 'stranger'; the team has planner, solver, critic"),
        (Seer, "calls on the seat 'stranger'"),
        (Vague, "ahead() raised TypeError"),
        (Unmade, "a defect"),
    ],
)
async def test_faulty_workflow_fails_its_job_alone(workflow: type[Workflow], error: str) -> None:
    team, forecast = embedded_team(), Forecast()
    forecast.seat({seat: seat for seat in team.seats})
    handles = await engines()
    result = await Orchestrator(replace(team, workflow=workflow), handles, forecast.on_event).run(Job("j", "1+2"))
    assert result.answer is None
    assert error in str(result.error)
    assert not any(forecast.open_calls().values())
    assert not any(forecast.coming().values())
    assert (await Orchestrator(team, handles, forecast.on_event).run(Job("k", "1+2"))).answer == "3"


async def test_listeners_hear_the_end_of_a_job_that_a_defect_ends() -> None:
    class Defective(Stranger):
        def ahead(self) -> Mapping[str, int]:
            raise SystemExit("a defect")

    events: list[Event] = []
    orchestrator = Orchestrator(replace(embedded_team(), workflow=Defective), await engines(), events.append)
    with pytest.raises(SystemExit):
        await orchestrator.run(Job("j", "1+2"))
    assert [event.job for event in events if isinstance(event, JobEnded)] == ["j"]


async def test_every_try_has_its_own_seed() -> None:
    seeds: list[int | None] = []

    class Unreadable(FakeEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            seeds.append(request.seed)
            yield Chunk(
                "rubbish" if len(seeds) < 3 else oracle.reply(request.messages[-1].content), (1,), 0.0, 1, "stop"
            )

    handles = await engines()
    handles["solver"] = Unreadable("solver", lambda request: "")
    result = await Orchestrator(embedded_team("vote"), handles).run(Job("j", "1+2", temperature=1.0))
    assert result.answer == "3"
    assert len(set(seeds)) == len(seeds) == 5


async def test_dead_engine_fails_the_jobs_that_need_it() -> None:
    handles = await engines()
    critic = handles["critic"]
    assert isinstance(critic, FakeEngine)
    critic.kill()
    result = await Orchestrator(embedded_team(), handles).run(Job("j", "1+2"))
    assert result.answer is None
    assert "critic is dead" in str(result.error)


async def test_cancelled_job_aborts_its_requests() -> None:
    handles = await engines(time_scale=50)
    job = asyncio.create_task(Orchestrator(embedded_team(), handles).run(Job("j", PROBLEM)))
    await asyncio.sleep(0.01)
    assert handles["planner"].stats().running == 1
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert all(handle.stats().running == handle.stats().waiting == 0 for handle in handles.values())


async def test_cut_off_reply_is_reported_with_its_limit() -> None:
    class Cut(FakeEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
            yield Chunk("A=1+", (1,), 0.0, 1, "length")

    handles = await engines()
    handles["planner"] = Cut("planner", lambda request: "")
    result = await Orchestrator(embedded_team(), handles).run(Job("j", "1+2"))
    assert "planner's reply could not be read 3 times" in str(result.error)
    assert f"cut off at {ArithmeticPlanner.sampling.max_tokens} tokens" in str(result.error)
