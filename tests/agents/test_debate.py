"""A debate: rounds, agreement, the judge's choice, and replies that cannot be read."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from agents.role import Reply
from agents.tasks import Argument, DebateTask, JudgeTask, Ranking
from agents.workflow import Outcome, RoleCall, Unusable
from agents.workflows.debate import Debate

PROBLEM = "(12+7)*5"


def debate(**options: Any) -> Debate:
    return Debate(PROBLEM, Debate.Options(**options))


def drive(workflow: Debate, replies: Iterator[Reply | Unusable]) -> list[RoleCall]:
    """Give each call, in order, the next reply. Return the calls."""
    calls = list(workflow.begin())
    for call in calls:
        calls += workflow.take(call, next(replies))
    return calls


def said(*answers: str) -> Iterator[Reply | Unusable]:
    return iter([Argument(answer=answer, reasoning=f"so {answer}") for answer in answers])


def test_agreement_ends_the_debate_without_the_judge() -> None:
    workflow = debate()
    calls = drive(workflow, said("95", "95", "95"))
    assert workflow.outcome == Outcome("95", True, 0)
    assert [(call.seat, call.variation) for call in calls] == [("solver", 0), ("solver", 1), ("solver", 2)]


def test_each_debater_revises_after_a_look_at_the_others() -> None:
    workflow = debate(debaters=["ann", "bob"], judge=None)
    calls = drive(workflow, said("95", "59", "95", "95"))
    assert workflow.outcome == Outcome("95", True, 1)
    assert calls[2].task == DebateTask(PROBLEM, "95 (because: so 95)", ("59 (because: so 59)",))
    assert calls[3].task == DebateTask(PROBLEM, "59 (because: so 59)", ("95 (because: so 95)",))
    assert [entry.round for entry in workflow.transcript] == [0, 0, 1, 1]


def test_judge_chooses_among_different_answers() -> None:
    workflow = debate(rounds=0)
    replies = [*said("95", "59", "59"), Ranking(order=(1, 2), reason="checked")]
    calls = drive(workflow, iter(replies))
    assert calls[-1].seat == "judge"
    assert calls[-1].task == JudgeTask(PROBLEM, ("95 (because: so 95)", "59 (because: so 59)"))
    assert workflow.outcome == Outcome("95", False, 0)


def test_majority_decides_without_a_judge() -> None:
    workflow = debate(rounds=0, judge=None)
    drive(workflow, said("95", "59", "59"))
    assert workflow.outcome == Outcome("59", False, 0)


def test_unreadable_reply_is_asked_for_again() -> None:
    workflow = debate(debaters=["ann", "bob"], rounds=0)
    first: list[Reply | Unusable] = [Unusable("dots"), Argument(answer="59"), Argument(answer="95")]
    calls = drive(workflow, iter([*first, Ranking(order=(3,)), Ranking(order=(1,))]))
    assert [call.seat for call in calls] == ["ann", "bob", "ann", "judge", "judge"]
    assert workflow.outcome == Outcome("95", False, 0)
    assert workflow.transcript[3].output == "unusable: candidate 3 does not exist; there are 2"


def test_debater_that_stays_unreadable_fails_the_problem() -> None:
    workflow = debate()
    drive(workflow, iter([Unusable("dots")] * 9))
    assert workflow.outcome is not None
    assert workflow.outcome.failure == "the solver's reply could not be read 3 times: dots"


@pytest.mark.parametrize(
    ("options", "seats"),
    [
        ({}, {"solver": (DebateTask,), "judge": (JudgeTask,)}),
        ({"judge": None}, {"solver": (DebateTask,)}),
        ({"debaters": ["ann", "bob"], "judge": "ann"}, {"ann": (DebateTask, JudgeTask), "bob": (DebateTask,)}),
    ],
)
def test_seats_follow_the_options(options: dict[str, Any], seats: Mapping[str, Any]) -> None:
    assert Debate.seats(Debate.Options(**options)) == seats


def test_debate_needs_two_debaters() -> None:
    with pytest.raises(ValidationError, match="debaters"):
        debate(debaters=["ann"])
