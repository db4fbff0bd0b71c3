"""The roles for instruct models: what they ask, the JSON they hold the model to, and what they make of its text."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from agents.critic import Critic
from agents.planner import STEPS_MAX, Planner
from agents.role import (
    REPLIES,
    Answer,
    AnswerTask,
    CritiqueTask,
    Message,
    Plan,
    PlanTask,
    Reply,
    ReplyUnusable,
    Role,
    Solution,
    SolveTask,
    Step,
    Task,
    Verdict,
)
from agents.solver import Solver

FIRST = Step(name="1", instruction="Count the minutes to 10:00.")
SECOND = Step(name="2", instruction="Add 65.", needs=("1",))
PROBLEM = "How long is it from 9:40 to 11:05?"
SOLVE = SolveTask(PROBLEM, SECOND, {"1": "20"})
CRITIQUE = CritiqueTask(PROBLEM, SECOND, "85", {"1": "20"})
ANSWER = AnswerTask(PROBLEM, (FIRST, SECOND), {"1": "20", "2": "85"})

CASES: list[tuple[Role, Task, dict[str, Any], Reply]] = [
    (
        Planner(),
        PlanTask(PROBLEM),
        {"steps": [FIRST.instruction, SECOND.instruction]},
        Plan(steps=(FIRST, SECOND)),
    ),
    (Solver(), SOLVE, {"work": "20+65", "result": "85"}, Solution(result="85", work="20+65")),
    (Solver(), ANSWER, {"answer": "85 minutes"}, Answer(answer="85 minutes")),
    (
        Critic(),
        CRITIQUE,
        {"check": "85-65=20", "accepted": False, "reason": "off"},
        Verdict(accepted=False, reason="off"),
    ),
]
IDS = ["plan", "solve", "answer", "critique"]


@pytest.mark.parametrize(("role", "task", "form", "reply"), CASES, ids=IDS)
def test_what_the_schema_allows_is_read(role: Role, task: Task, form: dict[str, Any], reply: Reply) -> None:
    schema = role.schema(task)
    assert schema is not None
    Draft202012Validator(schema).validate(form)
    assert role.parse(json.dumps(form), task) == reply
    assert type(reply) is REPLIES[type(task)]


@pytest.mark.parametrize(("role", "task", "form", "reply"), CASES, ids=IDS)
def test_what_the_schema_forbids_is_unusable(role: Role, task: Task, form: dict[str, Any], reply: Reply) -> None:
    validator = Draft202012Validator(role.schema(task) or {})
    for key in form:
        for wrong in ({k: v for k, v in form.items() if k != key}, {**form, key: None}, {**form, "more": 1}):
            assert not validator.is_valid(wrong)
            with pytest.raises(ReplyUnusable, match=f"{key}|more"):
                role.parse(json.dumps(wrong), task)


@pytest.mark.parametrize("text", ["", "}{", "null", '"85"', "The result is 85."])
@pytest.mark.parametrize(("role", "task", "form", "reply"), CASES, ids=IDS)
def test_other_text_is_unusable(role: Role, task: Task, form: dict[str, Any], reply: Reply, text: str) -> None:
    with pytest.raises(ReplyUnusable):
        role.parse(text, task)


@pytest.mark.parametrize("steps", [[], [""], ["x" * 401], ["x"] * (STEPS_MAX + 1)])
def test_a_plan_has_its_bounds(steps: list[str]) -> None:
    with pytest.raises(ReplyUnusable, match="steps"):
        Planner().parse(json.dumps({"steps": steps}), PlanTask(PROBLEM))


def test_a_step_of_a_plan_builds_on_all_before_it() -> None:
    plan = Planner().parse('{"steps": ["a", "b", "c"]}', PlanTask(PROBLEM))
    assert isinstance(plan, Plan)
    assert [(step.name, step.needs) for step in plan.steps] == [("1", ()), ("2", ("1",)), ("3", ("1", "2"))]
    assert plan.answer_step is None


def shown(messages: list[Message]) -> str:
    """What the model is told of the task: a system message says the role, a user message the task."""
    system, user = messages
    assert (system.role, user.role) == ("system", "user")
    assert "JSON" in system.content
    return user.content


def test_the_planner_is_told_the_problem() -> None:
    assert shown(Planner().messages(PlanTask(PROBLEM))) == PROBLEM


def test_the_solver_is_told_the_step_and_the_results_it_needs() -> None:
    assert shown(Solver().messages(SOLVE)).splitlines() == [
        f"Problem: {PROBLEM}",
        "Result of step 1: 20",
        "Your step: Add 65.",
    ]


def test_the_solver_is_told_why_its_last_result_was_rejected() -> None:
    again = SolveTask(PROBLEM, SECOND, {"1": "20"}, feedback="85-65 is not 30")
    assert "rejected: 85-65 is not 30" in shown(Solver().messages(again))


def test_the_solver_is_told_the_steps_with_their_results_for_the_answer() -> None:
    assert shown(Solver().messages(ANSWER)).splitlines() == [
        f"Problem: {PROBLEM}",
        "Result of step 1 (Count the minutes to 10:00.): 20",
        "Result of step 2 (Add 65.): 85",
    ]
    assert shown(Solver().messages(AnswerTask(PROBLEM))) == f"Problem: {PROBLEM}"


def test_the_critic_is_told_the_result_to_check() -> None:
    assert shown(Critic().messages(CRITIQUE)).splitlines() == [
        f"Problem: {PROBLEM}",
        "Result of step 1: 20",
        "Step: Add 65.",
        "Its result: 85",
    ]
