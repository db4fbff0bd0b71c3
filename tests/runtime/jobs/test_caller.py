"""Replies that end early: what is left of them, and what the transcript says."""

import json

import pytest

from agents.role import Sampling
from agents.roles.critic import Critic
from agents.roles.planner import Planner
from agents.roles.solver import Solver
from agents.workflows.deliberate import Deliberate
from runtime.engines.fake import FakeEngine
from runtime.engines.request import GenerateRequest
from runtime.jobs.job import Job, JobResult
from runtime.jobs.orchestrator import Orchestrator
from runtime.jobs.team import Seat, Team

pytestmark = pytest.mark.virtual_time

PLAN = json.dumps({"steps": ["add the numbers", "halve the sum", "round it"]})
REPLIES = {
    "planner": PLAN,
    "solver": json.dumps({"work": "12+7", "result": "19"}),
    "critic": json.dumps({"check": "19-7", "accepted": True, "reason": ""}),
}


def seat_of(request: GenerateRequest) -> str:
    system = request.messages[0].content
    return next(name for name in REPLIES if f"the {name} of a team" in system)


def reply(request: GenerateRequest) -> str:
    if "final answer" in request.messages[0].content:
        return '{"answer": "19"}'
    return REPLIES[seat_of(request)]


async def run(**max_tokens: int) -> tuple[JobResult, list[GenerateRequest]]:
    """Return a job's result and its requests. `max_tokens` bounds the replies of seats."""
    requests: list[GenerateRequest] = []

    def record(request: GenerateRequest) -> str:
        requests.append(request)
        return reply(request)

    engine = FakeEngine("chat", record, time_scale=0)
    await engine.start()
    roles = {"planner": Planner(), "solver": Solver(), "critic": Critic()}
    seats = {
        name: Seat(name, role, "chat", Sampling(), max_tokens=max_tokens.get(name)) for name, role in roles.items()
    }
    team = Team(seats, Deliberate, Deliberate.Options())
    return await Orchestrator(team, {"chat": engine}).run(Job("j", "What is (12+7)/2?")), requests


async def test_reply_that_is_cut_keeps_its_whole_values_and_says_so() -> None:
    whole, _ = await run()
    assert [entry.note for entry in whole.steps] == [""] * len(whole.steps)
    tokens = len(PLAN.split()) - 2
    cut, _ = await run(planner=tokens)
    first = cut.steps[0]
    assert first.output == "1=add the numbers; 2=halve the sum"
    assert first.note == f"cut off at {tokens} tokens"
    assert cut.answer == "19"


async def test_reply_that_lacks_what_it_needs_is_asked_for_again() -> None:
    result, requests = await run(solver=2)
    error = str(result.error)
    assert "the solver's reply could not be read 3 times" in error
    assert error.endswith("(cut off at 2 tokens)")
    assert [seat_of(request) for request in requests] == ["planner", "solver", "solver", "solver"]


async def test_role_decides_how_long_a_reply_to_each_task_may_be() -> None:
    _, requests = await run()
    step, answer = requests[1], requests[-1]
    assert step.max_tokens is not None
    assert answer.max_tokens is not None
    assert answer.max_tokens < step.max_tokens <= Sampling().max_tokens
    assert all(request.schema for request in requests)
