"""The roles for chat models: their messages, their schemas, and how they read replies."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from agents.role import Message, Reply, ReplyUnusable, Role, Task
from agents.roles.coder import Coder
from agents.roles.critic import Critic
from agents.roles.judge import Judge
from agents.roles.planner import STEPS_MAX, Planner
from agents.roles.solver import Solver
from agents.roles.summarizer import Summarizer
from agents.tasks import (
    Answer,
    AnswerTask,
    Argument,
    CritiqueTask,
    DebateTask,
    JudgeTask,
    Plan,
    PlanTask,
    Ranking,
    Solution,
    SolveTask,
    Step,
    Text,
    Verdict,
    WriteTask,
)

FIRST = Step(name="1", instruction="Count the minutes to 10:00.")
SECOND = Step(name="2", instruction="Add 65.", needs=("1",))
PROBLEM = "How long is it from 9:40 to 11:05?"
SOLVE = SolveTask(PROBLEM, SECOND, {"1": "20"})
CRITIQUE = CritiqueTask(PROBLEM, SECOND, "85", {"1": "20"})
ANSWER = AnswerTask(PROBLEM, (FIRST, SECOND), {"1": "20", "2": "85"})

DEBATE = DebateTask(PROBLEM, "65", ("85", "65"))
JUDGE = JudgeTask(PROBLEM, ("65", "85"))
WRITE = WriteTask(PROBLEM, {"researcher": "Count from 10:00."})
PROGRAM = Text(text="Prints 85.", values={"code": "print(85)"})

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
    (Solver(), DEBATE, {"reasoning": "20+65", "answer": "85"}, Argument(answer="85", reasoning="20+65")),
    (Judge(), JUDGE, {"check": "85", "order": [2, 1], "reason": "so"}, Ranking(order=(2, 1), reason="so")),
    (Coder(), WRITE, {"text": "Prints 85.", "code": "print(85)"}, PROGRAM),
]
IDS = ["plan", "solve", "answer", "critique", "debate", "judge", "write"]


@pytest.mark.parametrize(("role", "task", "form", "reply"), CASES, ids=IDS)
def test_reply_that_fits_the_schema_is_read(role: Role, task: Task, form: dict[str, Any], reply: Reply) -> None:
    schema = role.schema(task)
    assert schema is not None
    Draft202012Validator(schema).validate(form)
    assert role.parse(json.dumps(form), task) == reply
    assert type(reply) is type(task).reply_type


@pytest.mark.parametrize(("role", "task", "form", "reply"), CASES, ids=IDS)
def test_reply_that_violates_the_schema_is_unusable(role: Role, task: Task, form: dict[str, Any], reply: Reply) -> None:
    validator = Draft202012Validator(role.schema(task) or {})
    for key in form:
        for wrong in ({k: v for k, v in form.items() if k != key}, {**form, key: None}, {**form, "more": 1}):
            assert not validator.is_valid(wrong)
            if key == "reason" and key not in wrong:  # a reply that was cut off before it is readable
                assert str(role.parse(json.dumps(wrong), task)) in str(reply)
                continue
            with pytest.raises(ReplyUnusable, match=f"{key}|more"):
                role.parse(json.dumps(wrong), task)


@pytest.mark.parametrize("text", ["", "}{", "null", '"85"', "The result is 85."])
@pytest.mark.parametrize(("role", "task", "form", "reply"), CASES, ids=IDS)
def test_text_that_is_not_the_json_is_unusable(
    role: Role, task: Task, form: dict[str, Any], reply: Reply, text: str
) -> None:
    with pytest.raises(ReplyUnusable):
        role.parse(text, task)


@pytest.mark.parametrize("steps", [[], [""], ["x" * 401], ["x"] * (STEPS_MAX + 1)])
def test_plan_outside_its_bounds_is_unusable(steps: list[str]) -> None:
    with pytest.raises(ReplyUnusable, match="steps"):
        Planner().parse(json.dumps({"steps": steps}), PlanTask(PROBLEM))


def test_each_step_of_a_plan_needs_all_earlier_steps() -> None:
    plan = Planner().parse('{"steps": ["a", "b", "c"]}', PlanTask(PROBLEM))
    assert isinstance(plan, Plan)
    assert [(step.name, step.needs) for step in plan.steps] == [("1", ()), ("2", ("1",)), ("3", ("1", "2"))]
    assert plan.answer_step is None


def user_text(messages: list[Message]) -> str:
    """Return the user message, which states the task. The system message states the role."""
    system, user = messages
    assert (system.role, user.role) == ("system", "user")
    assert "JSON" in system.content
    return user.content


def test_planner_prompt_is_the_problem() -> None:
    assert user_text(Planner().messages(PlanTask(PROBLEM))) == PROBLEM


def test_solver_prompt_has_the_step_and_the_results_it_needs() -> None:
    assert user_text(Solver().messages(SOLVE)).splitlines() == [
        f"Problem: {PROBLEM}",
        "Result of step 1: 20",
        "Your step: Add 65.",
    ]


def test_solver_prompt_has_the_reason_of_the_rejection() -> None:
    again = SolveTask(PROBLEM, SECOND, {"1": "20"}, feedback="85-65 is not 30")
    assert "rejected: 85-65 is not 30" in user_text(Solver().messages(again))


def test_answer_prompt_has_the_steps_with_their_results() -> None:
    assert user_text(Solver().messages(ANSWER)).splitlines() == [
        f"Problem: {PROBLEM}",
        "Result of step 1 (Count the minutes to 10:00.): 20",
        "Result of step 2 (Add 65.): 85",
    ]
    assert user_text(Solver().messages(AnswerTask(PROBLEM))) == f"Problem: {PROBLEM}"


def test_critic_prompt_has_the_result_to_check() -> None:
    assert user_text(Critic().messages(CRITIQUE)).splitlines() == [
        f"Problem: {PROBLEM}",
        "Result of step 1: 20",
        "Step: Add 65.",
        "Its result: 85",
    ]


def test_debate_prompt_has_the_answers_of_the_others() -> None:
    assert user_text(Solver().messages(DEBATE)).splitlines() == [
        f"Problem: {PROBLEM}",
        "Your last answer: 65",
        "Another solver's answer: 85",
        "Another solver's answer: 65",
    ]
    assert user_text(Solver().messages(DebateTask(PROBLEM))) == f"Problem: {PROBLEM}"


def test_judge_prompt_numbers_the_candidates() -> None:
    assert user_text(Judge().messages(JUDGE)).splitlines() == [
        f"Problem: {PROBLEM}",
        "Candidate 1: 65",
        "Candidate 2: 85",
    ]


@pytest.mark.parametrize("order", [[3], [0], [1, 1, 1], []])
def test_order_outside_the_candidates_does_not_fit(order: list[int]) -> None:
    form = {"check": "", "order": order, "reason": ""}
    assert not Draft202012Validator(Judge().schema(JUDGE)).is_valid(form)


def test_repeated_candidates_are_ranked_once() -> None:
    text = json.dumps({"check": "", "order": [2, 2], "reason": ""})
    assert Judge().parse(text, JUDGE) == Ranking(order=(2,))


def test_coder_is_a_solver_that_runs_programs() -> None:
    assert Coder.tools == ("python",)
    for task in (SOLVE, ANSWER, DEBATE, WRITE):
        assert "run it with the\ntool python" in Coder().messages(task)[0].content
    assert Coder().messages(SOLVE)[1] == Solver().messages(SOLVE)[1]


def test_summarizer_reads_what_the_others_wrote_and_replies_in_free_text() -> None:
    [_, user] = Summarizer().messages(WRITE)
    assert user.content == f"Request: {PROBLEM}\n\nFrom researcher:\nCount from 10:00."
    assert Summarizer().schema(WRITE) is None
    assert Summarizer().parse(" 85 minutes. ", WRITE) == Text(text="85 minutes.")
    with pytest.raises(ReplyUnusable):
        Summarizer().parse(" ", WRITE)
