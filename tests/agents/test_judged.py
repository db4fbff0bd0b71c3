"""A workflow with a judge at its end, who compares the answer with the expected one."""

from agents.tasks import Answer, CompareTask, Verdict
from agents.workflow import Outcome, Unusable
from agents.workflows.judged import Judged
from agents.workflows.solo import Solo


def judged() -> Judged:
    return Judged(Solo("How long?", Solo.Options()), "judge", "85 minutes")


def test_judge_compares_the_answer_once_there_is_one() -> None:
    workflow = judged()
    [call] = workflow.begin()
    assert (call.seat, workflow.ahead()) == ("solver", {"judge": 1})
    [comparison] = workflow.take(call, Answer(answer="1 h 25 min"))
    assert (comparison.seat, workflow.ahead()) == ("judge", {})
    assert comparison.task == CompareTask("How long?", "1 h 25 min", "85 minutes")
    assert comparison.number != call.number
    assert workflow.take(comparison, Verdict(accepted=True, reason="the same time")) == []
    assert workflow.outcome == Outcome("1 h 25 min", None, 0, correct=True)
    assert [entry.seat for entry in workflow.transcript] == ["solver", "judge"]


def test_judge_is_not_asked_without_an_answer() -> None:
    workflow = judged()
    calls = workflow.begin()
    while calls:
        [call] = calls
        assert call.seat == "solver"
        calls = workflow.take(call, Unusable("dots"))
    assert workflow.outcome is not None
    assert workflow.outcome.answer is None


def test_answer_stays_if_the_judge_cannot_be_read() -> None:
    workflow = judged()
    [call] = workflow.begin()
    calls = workflow.take(call, Answer(answer="1 h 25 min"))
    tries = 0
    while calls:
        assert workflow.outcome is None
        calls = workflow.take(calls[0], Unusable("dots"))
        tries += 1
    assert (tries, workflow.outcome) == (3, Outcome("1 h 25 min", None, 0))
