"""Modelled engines give every shipped role replies that it can read, and debaters different ones."""

import pytest

from agents.registry import registered
from agents.role import Role, Task, TaskRefused
from agents.roles.judge import Judge
from agents.roles.solver import Solver
from agents.workflow import Outcome
from agents.workflows.debate import Debate
from agents.workflows.pipeline import Pipeline
from runtime.engines.fake import FakeEngine
from runtime.engines.request import GenerateRequest
from runtime.jobs.job import Job
from runtime.jobs.orchestrator import Orchestrator
from runtime.jobs.team import Seat, Team
from runtime.simulation import calls

pytestmark = pytest.mark.virtual_time

ROLES = {e.name: e.load_role() for e in registered("role") if e.origin.startswith("troupe-llm ")}


def accepted(role: type[Role], kind: type[Task]) -> list[Task]:
    """Return the examples that a role accepts. The embedded team refuses plain language."""
    tasks = []
    for task in kind.examples():
        try:
            role().check(task.problem)
            role().messages(task)
        except TaskRefused:
            continue
        tasks.append(task)
    assert tasks, (role, kind)
    return tasks


CASES = [(name, role, task) for name, role in ROLES.items() for kind in role.takes for task in accepted(role, kind)]


@pytest.mark.parametrize(("name", "role", "task"), CASES, ids=[f"{name} {task.kind}" for name, _, task in CASES])
def test_modelled_reply_is_readable(name: str, role: type[Role], task: Task) -> None:
    request = GenerateRequest("1", tuple(role().messages(task)), 0.0, 1.0, 100, schema=role().schema(task))
    try:
        text = calls.reply(request)
    except KeyError as error:
        raise AssertionError(f"no reply for {name}") from error
    assert isinstance(role().parse(text, task), task.reply_type)


async def modelled(team: Team, seed: int = 0) -> Outcome:
    engine = FakeEngine("chat", calls.reply, time_scale=0)
    await engine.start()
    result = await Orchestrator(team, {"chat": engine}).run(Job("j", "Why is the sky blue?", seed=seed))
    assert result.error is None
    return Outcome(result.answer, result.confirmed, result.rounds)


async def test_modelled_debates_reach_the_judge_or_agree() -> None:
    seats = {"solver": Seat("solver", Solver(), "chat", Solver.sampling)}
    seats["judge"] = Seat("judge", Judge(), "chat", Judge.sampling)
    team = Team(seats, Debate, Debate.Options())
    outcomes = [await modelled(team, seed=seed) for seed in range(20)]
    assert {outcome.confirmed for outcome in outcomes} == {True, False}
    assert outcomes[0] == await modelled(team, seed=0)


async def test_modelled_pipeline_ends() -> None:
    seats = {name: Seat(name, ROLES[name](), "chat", ROLES[name].sampling) for name in ("coder", "summarizer")}
    assert (await modelled(Team(seats, Pipeline, Pipeline.Options(seats=("coder", "summarizer"))))).answer
